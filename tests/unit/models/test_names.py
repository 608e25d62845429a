# SPDX-License-Identifier: Apache-2.0
"""Names: every parameter finds its tensor, tied or not, with or without the backbone's prefix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from keelwright.core.errors import ModelMismatchError
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.names import name_map, require_untied, tied_tensors

MakeFolder = Callable[..., Path]
MakeModel = Callable[..., PreTrainedModel]
ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3"]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_finds_the_tensor_with_its_values(
    make_folder: MakeFolder, make_model: MakeModel, architecture: str, tied: bool
) -> None:
    source = Checkpoint(make_folder(architecture, tie_word_embeddings=tied))
    module = make_model(architecture, tie_word_embeddings=tied)
    pairs = name_map(module, source)
    parameters = dict(module.named_parameters())
    assert pairs.keys() == parameters.keys()
    assert (HEAD in pairs) is not tied
    assert set(pairs.values()) == set(source.entries())
    for parameter, name in pairs.items():
        values = source.read(name, 0, parameters[parameter].numel())
        assert torch.equal(values.view(parameters[parameter].shape), parameters[parameter])
    assert tied_tensors(source.config_json()) == ({HEAD: EMBEDDING} if tied else {})


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Checkpoint:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return Checkpoint(folder, "changed")


def test_a_tied_model_may_store_the_head_instead_or_both(make_folder: MakeFolder, make_model: MakeModel) -> None:
    module = make_model("llama", tie_word_embeddings=True)
    folder = make_folder("llama", tie_word_embeddings=True)
    both = rewrite(folder, lambda tensors: {**tensors, HEAD: tensors[EMBEDDING].clone()})
    assert name_map(module, both)[EMBEDDING] == EMBEDDING
    head = rewrite(folder, lambda tensors: {name: one for name, one in tensors.items() if name != EMBEDDING})
    assert name_map(module, head)[EMBEDDING] == HEAD


def test_a_backbones_checkpoint_lacks_the_prefix(make_folder: MakeFolder, make_model: MakeModel) -> None:
    module = make_model("llama", tie_word_embeddings=True)
    source = rewrite(
        make_folder("llama", tie_word_embeddings=True),
        lambda tensors: {name.removeprefix("model."): one for name, one in tensors.items()},
    )
    assert name_map(module, source)["model.layers.0.mlp.up_proj.weight"] == "layers.0.mlp.up_proj.weight"


def test_a_parameter_without_a_tensor_is_named(make_folder: MakeFolder, make_model: MakeModel) -> None:
    source = rewrite(make_folder("llama"), lambda tensors: {name: one for name, one in tensors.items() if name != HEAD})
    with pytest.raises(ModelMismatchError) as caught:
        name_map(make_model("llama"), source)
    assert caught.value.problem == "The tensors of 'changed' are not the parameters of LlamaForCausalLM."
    assert HEAD in str(caught.value.expected)
    assert caught.value.fix


def test_a_tensor_without_a_parameter_is_named(make_folder: MakeFolder, make_model: MakeModel) -> None:
    source = rewrite(make_folder("llama"), lambda tensors: {**tensors, "stranger": torch.ones(1)})
    with pytest.raises(ModelMismatchError, match="also stranger"):
        name_map(make_model("llama"), source)


def test_another_shape_is_named(make_folder: MakeFolder, make_model: MakeModel) -> None:
    source = Checkpoint(make_folder("llama", vocab_size=40))
    with pytest.raises(ModelMismatchError, match=r"shape \[40, 32\]"):
        name_map(make_model("llama"), source)


@pytest.mark.parametrize("config", [{}, {"model_type": "of-the-future"}, {"model_type": "clip_vision_model"}])
def test_unknown_architectures_tie_nothing_that_we_know(config: dict[str, str]) -> None:
    assert tied_tensors(config) == {}


def test_an_adapter_may_not_touch_a_tied_tensor(make_folder: MakeFolder) -> None:
    config = json.loads((make_folder("qwen2") / "config.json").read_text())
    require_untied(config, "lora", ["model.layers.0.self_attn.q_proj.weight"])
    with pytest.raises(ModelMismatchError) as caught:
        require_untied(config, "lora", [EMBEDDING])
    assert caught.value.problem == "The adapter 'lora' changes a tensor that the base ties to another."
    assert caught.value.found == EMBEDDING
    require_untied({**config, "tie_word_embeddings": False}, "lora", [EMBEDDING])
