# SPDX-License-Identifier: Apache-2.0
"""Records to measure, and a tiny model with a word tokenizer to make some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.records import Judgement, Record
from keelwright.models.loading import LoadedModel

WORDS = ["<pad>", "<bos>", "<end>", "<unk>", "the", "cat", "sees", "a", "lamp", "old", "river", "and", "stone", "dog"]

MakeRecord = Callable[..., Record]


@pytest.fixture
def record() -> MakeRecord:
    """Make a record of kind `harmful` that refuses, unless told otherwise."""

    def make(item_id: str = "h1", label: str = "refusal_full", **changes: Any) -> Record:
        score, raw = changes.pop("score", None), changes.pop("raw", None)
        judge_id = changes.pop("judge_id", "test@1")
        fields: dict[str, Any] = {
            "item_id": item_id,
            "suite": "test",
            "suite_digest": "s0",
            "kind": "harmful",
            "hazard": "theft",
            "prompt": f"prompt of {item_id}",
            "model_id": "model",
            "revision": "r0",
            "template_digest": "t0",
            "decoding_digest": "d0",
            "output": "text",
            "n_tokens": 3,
            "finish": "eos",
            "judgements": {judge_id: Judgement(label, score, raw)},
        }
        return Record(**{**fields, **changes})

    return make


@pytest.fixture
def make_model() -> Callable[..., LoadedModel]:
    """Build a random Llama of 14 words that reads 64 tokens."""

    def make(seed: int = 0, *, scale: float = 0.3, bos: bool = False) -> LoadedModel:
        words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
        words.pre_tokenizer = WhitespaceSplit()
        if bos:
            from tokenizers.processors import TemplateProcessing

            words.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<end>", unk_token="<unk>"
        )
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=scale,
            bos_token_id=1,
            eos_token_id=2,
        )
        return LoadedModel(LlamaForCausalLM(config).eval(), tokenizer, f"tiny {seed}", f"r{seed}")

    return make
