# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of real architectures, and a word-level tokenizer for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sees",
    "likes",
    "paints",
    "hides",
    "lamp",
    "river",
    "stone",
    "green",
    "small",
    "old",
    "what",
    "who",
    "where",
    "is",
    "in",
    "on",
]
SPECIAL = ["<pad>", "<bos>", "<end>", "<unk>", "<user>", "<model>", "<system>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user> {{ message['content'] }} "
    "{% elif message['role'] == 'system' %}<system> {{ message['content'] }} "
    "{% else %}<model> {{ message['content'] }} <end> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": False, "head_dim": 8}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 6}),
    "gemma3": (
        Gemma3TextConfig,
        {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral": (MistralConfig, {"sliding_window": 6}),
    "phi3": (Phi3Config, {}),
}

MakeModel = Callable[..., PreTrainedModel]
MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
MakeFolder = Callable[..., Path]


def _model(
    architecture: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> PreTrainedModel:
    kind, settings = CONFIGS[architecture]
    config = kind(**{**SIZES, **settings, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # Wider than the usual start, so that answers differ from prompt to prompt.
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def _tokenizer(
    *, words: list[str] | None = None, template: str | None = TEMPLATE, adds_bos: bool = False, **settings: object
) -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate([*SPECIAL, *(words or WORDS)])}
    core = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<model>", "<system>"],
        **settings,
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def make_model() -> MakeModel:
    return _model


@pytest.fixture
def make_tokenizer() -> MakeTokenizer:
    return _tokenizer


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Save a tiny model with its tokenizer; `shard` gives the largest shard, such as `20KB`."""

    def make(
        architecture: str = "llama",
        *,
        name: str | None = None,
        shard: str | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        **changes: object,
    ) -> Path:
        folder = tmp_path / (name or architecture)
        model = _model(architecture, **changes)
        model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        (tokenizer or _tokenizer()).save_pretrained(folder)
        return folder

    return make
