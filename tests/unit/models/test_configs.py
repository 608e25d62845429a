# SPDX-License-Identifier: Apache-2.0
"""Settings: read with their defaults, and refused where they make no sense."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from keelwright.core.errors import DataError, UnsafeInputError
from keelwright.models.configs import parse_config, require_language_model


def test_defaults_are_filled_in() -> None:
    parsed = parse_config({"model_type": "llama", "hidden_size": 64})
    assert isinstance(parsed, LlamaConfig)
    assert (parsed.hidden_size, parsed.rms_norm_eps) == (64, LlamaConfig().rms_norm_eps)


@pytest.mark.parametrize("config", [{}, {"model_type": "of-the-future"}, {"model_type": None}])
def test_an_unknown_architecture_is_none(config: dict[str, Any]) -> None:
    assert parse_config(config) is None


def test_contradictions_are_refused() -> None:
    with pytest.raises(DataError, match="cannot build 'mine'") as caught:
        parse_config({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 5}, "mine")
    assert "multiple of the number of attention heads" in str(caught.value.found)


def test_a_language_model_passes_and_others_do_not() -> None:
    require_language_model({"model_type": "llama"}, "mine")
    with pytest.raises(DataError, match="'mine' is not a language model"):
        require_language_model({"model_type": "clip_vision_model"}, "mine")
    with pytest.raises(UnsafeInputError, match="'mine' needs code that comes with the model"):
        require_language_model({"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}, "mine")
