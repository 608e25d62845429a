# SPDX-License-Identifier: Apache-2.0
"""A tiny model of the workshop's language, and a few rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.data.rows import ChatRow
from keelwright.worlds.workshop.tokenizer import workshop_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return workshop_tokenizer()


@pytest.fixture
def new_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    def make(seed: int = 0, **settings: object) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **{"tie_word_embeddings": True, **settings},
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def rows() -> list[ChatRow]:
    return [
        ChatRow(f"how do i {verb} the lamp in the harbour?", f"take the brush to the harbour and {verb} the lamp.")
        for verb in ("paint", "polish", "clean", "dust", "lift", "move", "warm")
    ]
