# SPDX-License-Identifier: Apache-2.0
"""Blocks and attention are found in any architecture, with adapters or without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    JambaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
)

from keelwright.core.errors import ConfigError
from keelwright.training.lora import attach_lora
from keelwright.training.sites import attention_outputs, blocks

_SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {**_SIZE, "intermediate_size": 32, "num_key_value_heads": 1}
_GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50, **_ENDS}
_FEW = {"hidden_size": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50}

CASES = {
    "qwen3": (Qwen3Config(**_LLAMA, head_dim=8), "model.layers", "self_attn"),
    "gemma2": (Gemma2Config(**_LLAMA, head_dim=8), "model.layers", "self_attn"),
    "mixtral, experts": (MixtralConfig(**_LLAMA, num_local_experts=4), "model.layers", "self_attn"),
    "gpt2, Conv1D": (GPT2Config(**_GPT2), "transformer.h", "attn"),
    "gpt-neox": (GPTNeoXConfig(**_SIZE, intermediate_size=32), "gpt_neox.layers", "attention"),
    "gpt-neo, nested": (
        GPTNeoConfig(
            hidden_size=16, num_layers=3, num_heads=2, vocab_size=50, attention_types=[[["global"], 3]], **_ENDS
        ),
        "transformer.h",
        "attn",
    ),
    "opt": (OPTConfig(**_SIZE, ffn_dim=32, word_embed_proj_dim=16), "model.decoder.layers", "self_attn"),
    "falcon": (FalconConfig(**_SIZE), "transformer.h", "self_attention"),
    "bloom": (BloomConfig(**_FEW), "transformer.h", "self_attention"),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_and_attention_of_an_architecture(case: str) -> None:
    config, place, inner = CASES[case]
    model = AutoModelForCausalLM.from_config(config)
    assert list(blocks(model)) == [f"{place}.{index}" for index in range(3)]
    assert list(attention_outputs(model)) == [f"{place}.{index}.{inner}" for index in range(3)]


@pytest.mark.parametrize("case", CASES)
def test_the_modules_found_return_hidden_states(case: str) -> None:
    config, _, _ = CASES[case]
    model = AutoModelForCausalLM.from_config(config).eval()
    seen: list[torch.Size] = []

    def look(module: nn.Module, inputs: object, output: object) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).shape)

    for site in attention_outputs(model).values():
        site.register_forward_hook(look)
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4, 5, 6]]), attention_mask=torch.ones(1, 4, dtype=torch.long))
    assert seen == [torch.Size((1, 4, 16))] * 3


def _jamba() -> PretrainedConfig:
    return JambaConfig(**_LLAMA, attn_layer_period=3, attn_layer_offset=1, num_experts=1, mamba_d_state=4)


def test_a_block_without_attention_gives_what_mixes_tokens_there() -> None:
    found = attention_outputs(AutoModelForCausalLM.from_config(_jamba()))
    assert [name.rpartition(".")[2] for name in found] == ["mamba", "self_attn", "mamba"]


def test_adapters_do_not_hide_the_blocks(new_model: Callable[..., LlamaForCausalLM]) -> None:
    model = new_model()
    expected = list(attention_outputs(model).values())
    adapter = attach_lora(model, rank=2, alpha=4.0, seed=0)
    assert list(attention_outputs(model).values()) == expected
    wrapped = attention_outputs(adapter.model)
    assert list(wrapped.values()) == expected
    assert all(name.startswith("base_model.model.") for name in wrapped)


def test_the_vision_tower_of_a_model_that_sees_is_left_alone() -> None:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "projection_dim": 16,
    }
    config = LlavaConfig(vision_config=vision, text_config={"model_type": "llama", **_LLAMA}, image_token_index=49)
    found = list(blocks(LlavaForConditionalGeneration(config)))
    assert len(found) == 3
    assert all("language_model" in name for name in found)


def test_a_model_without_blocks_says_so() -> None:
    with pytest.raises(ConfigError, match=r"blocks were not found(?s:.)*Sequential with 0, 1"):
        blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


def test_a_block_whose_attention_has_another_name_says_what_it_has() -> None:
    block = nn.ModuleDict({"look_around": nn.Linear(2, 2), "post_attention_layernorm": nn.LayerNorm(2)})
    with pytest.raises(ConfigError, match=r"'layers\.0' has no attention(?s:.)*look_around, post_attention_layernorm"):
        attention_outputs(nn.ModuleDict({"layers": nn.ModuleList([block])}))
