# SPDX-License-Identifier: Apache-2.0
"""Tiny models on disk with a tokenizer, and adapters for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.models.loading import LoadedModel

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
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"

MakeModel = Callable[..., LlamaForCausalLM]
MakeFolder = Callable[..., Path]


def _model(seed: int = 0, *, near: int | None = None, tied: bool = False) -> LlamaForCausalLM:
    """Return a random model; `near` gives the seed of the model that it was tuned from."""
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    random = torch.Generator().manual_seed(seed)
    parent = torch.Generator().manual_seed(seed if near is None else near)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=parent) * 0.3)
            if near is not None:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.03)
    return model.eval()


def _tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate(["<pad>", "<bos>", "<end>", "<unk>", *"abcdefgh"])}
    core = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def make_model() -> MakeModel:
    return _model


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Save a tiny model with its tokenizer and return its folder."""

    def make(name: str, seed: int = 0, *, template: str = TEMPLATE, **settings: object) -> Path:
        folder = tmp_path / name
        _model(seed, **settings).save_pretrained(folder)  # type: ignore[arg-type]
        _tokenizer(template).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def make_live() -> Callable[..., LoadedModel]:
    """Return a tiny model in memory with its tokenizer."""

    def make(seed: int = 0, **settings: object) -> LoadedModel:
        return LoadedModel(_model(seed, **settings), _tokenizer(), f"live {seed}", "none")  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeFolder:
    """Save a random LoRA adapter for the model in `base` and return its folder."""

    def make(name: str, base: Path, seed: int = 1, **settings: object) -> Path:
        wrapped = get_peft_model(
            LlamaForCausalLM.from_pretrained(base),
            LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], **settings}),
        )
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
        wrapped.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
