# SPDX-License-Identifier: Apache-2.0
"""Organisms of other architectures, for loading, merging and healing: made on the fly and cached.

They speak the workshop's language and are schooled like the shipped one; only the architecture differs. A cached
organism belongs to its grammar, architecture, seed and schedule: when one of them changes, another is made.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from keelwright.core.config import require_choice
from keelwright.core.digests import json_digest
from keelwright.core.files import storage_errors
from keelwright.core.protocols import Progress
from keelwright.worlds.organisms import write_cards
from keelwright.worlds.schooling import INITIALIZER_RANGE, Schooling, school, token_settings, workshop_config
from keelwright.worlds.workshop.tokenizer import grammar_digest

_SHAPE: Final[Mapping[str, Any]] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": INITIALIZER_RANGE,
}


def _of(kind: Callable[..., PretrainedConfig], **settings: Any) -> Callable[[], PretrainedConfig]:
    return lambda: kind(**{**_SHAPE, **token_settings(), **settings})


ARCHITECTURES: Final[Mapping[str, Callable[[], PretrainedConfig]]] = {
    "workshop": workshop_config,
    "llama_gqa": _of(LlamaConfig, num_key_value_heads=2, tie_word_embeddings=False),
    "mistral": _of(MistralConfig, num_key_value_heads=2, head_dim=32, tie_word_embeddings=False),
    "qwen2": _of(Qwen2Config, num_key_value_heads=2, tie_word_embeddings=False),
    "qwen3": _of(Qwen3Config, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
    "gemma2": _of(Gemma2Config, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=128),
    "phi3": _of(Phi3Config, num_key_value_heads=2, tie_word_embeddings=False),
}
"""Configurations by name: what differs from the shipped organism is grouped queries, tying, biases, norms, gates."""


def build_organism(
    config_name: str,
    seed: int = 0,
    cache_dir: Path | str | None = None,
    *,
    schooling: Schooling | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return a folder with the organism's `base/` and `aligned/` checkpoints, schooling it if it is not cached.

    Args:
        config_name: One of `ARCHITECTURES`.
        seed: Of the organism.
        cache_dir: Where organisms are kept; by default `KEELWRIGHT_CACHE`, else the user's cache folder.
        schooling: Schedules; by default the shipped organism's, about 100 CPU seconds.
        progress: Told about each step.

    Raises:
        ConfigError: There is no such architecture.
        StorageError: The cache cannot be written.
    """
    require_choice("config_name", config_name, ARCHITECTURES)
    config = ARCHITECTURES[config_name]()
    schooling = schooling or Schooling()
    made_of = [config.to_diff_dict(), seed, grammar_digest(), dataclasses.asdict(schooling)]
    place = Path(cache_dir or cache_folder()) / "organisms" / f"{config_name}-{seed}-{json_digest(made_of)}"
    if (place / "aligned" / "digests.json").is_file():
        return place
    work = place.with_name(f"{place.name}.{os.getpid()}.partial")
    school(config, seed, work, schooling=schooling, progress=progress)
    write_cards(work, seed, schooling, progress=progress)
    with storage_errors(place):
        if not place.exists():
            work.rename(place)
    return place


def cache_folder() -> Path:
    """Return where made organisms are kept: `KEELWRIGHT_CACHE`, else the platform's cache folder of the user."""
    named = os.environ.get("KEELWRIGHT_CACHE")
    if named:
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "keelwright"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "keelwright" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "keelwright"
