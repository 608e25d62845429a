# SPDX-License-Identifier: Apache-2.0
"""Sources in memory, tiny checkpoints on disk, and edits of every reach."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from keelwright.core.protocols import Chunk, Found, Reach, Stats, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.weights.edit import Edit

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class MemorySource:
    """Tensors in memory as a `TensorSource`."""

    def __init__(self, tensors: Mapping[str, Tensor], text: str = "in memory") -> None:
        self.tensors = dict(tensors)
        self.text = text

    def entries(self) -> Mapping[str, TensorEntry]:
        return {
            name: TensorEntry(name, STORED_NAMES[tensor.dtype], tuple(tensor.shape))
            for name, tensor in self.tensors.items()
        }

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name].flatten()[start:stop].clone()

    def describe(self) -> str:
        return self.text


@dataclass(frozen=True)
class CenteredEdit(Edit):
    """Subtracts the mean of the tuned tensor: needs a reduction."""

    def reach(self, name: str) -> Reach:
        return Reach.REDUCED

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        values = chunk.tensors["tuned"]
        return {"sum": float(values.double().sum()), "count": float(values.numel())}

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        return chunk.tensors["tuned"] - found["sum"] / found["count"]


@dataclass(frozen=True)
class FlippedEdit(Edit):
    """Reverses the rows of a matrix: needs all of it."""

    def reach(self, name: str) -> Reach:
        return Reach.MATRIX

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        return chunk.tensors["tuned"].flip(0)


@pytest.fixture
def memory() -> type[MemorySource]:
    return MemorySource


@pytest.fixture
def centered() -> CenteredEdit:
    return CenteredEdit()


@pytest.fixture
def flipped() -> FlippedEdit:
    return FlippedEdit()


@pytest.fixture
def make_tensors() -> Callable[..., dict[str, Tensor]]:
    """Return random tensors of odd sizes under the names of a model."""

    def make(seed: int = 0, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(seed)
        shapes = {
            "model.embed_tokens.weight": (11, 6),
            "model.layers.0.mlp.weight": (7, 13),
            "model.layers.2.mlp.weight": (5, 5),
            "model.layers.10.mlp.weight": (3, 9),
            "model.norm.weight": (6,),
            "lm_head.weight": (11, 6),
        }
        return {name: (scale * torch.randn(shape, generator=random)).to(dtype) for name, shape in shapes.items()}

    return make


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write tensors as a checkpoint folder, in one file or dealt out over several."""

    def make(name: str, tensors: Mapping[str, Tensor], *, files: int = 1, **config: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        settings = {"model_type": "llama", "tie_word_embeddings": False, "dtype": "bfloat16", **config}
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "tokenizer.json").write_text('{"of": "a test"}')
        if files == 1:
            save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        weight_map = {}
        for index in range(files):
            file = f"model-{index + 1:05d}-of-{files:05d}.safetensors"
            part = {key: tensor for at, (key, tensor) in enumerate(tensors.items()) if at % files == index}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return make


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Return a tiny random Llama; seeds give different weights."""

    def make(seed: int = 0, *, dtype: torch.dtype = torch.float32, tied: bool = False) -> LlamaForCausalLM:
        model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied))
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def make_lora(tmp_path: Path) -> Callable[..., Path]:
    """Save a random LoRA adapter for the Llama in a folder."""

    def make(base: Path, name: str, *, seed: int = 0, **settings: object) -> Path:
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings})
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.1)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
