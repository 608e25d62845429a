# SPDX-License-Identifier: Apache-2.0
"""`config.json` as transformers understands it, defaults filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from keelwright.core.errors import DataError, UnsafeInputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BAD_SETTINGS = (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError)
"""What transformers raises when settings make no sense."""


def parse_config(config: Mapping[str, Any], text: str = "config.json") -> PreTrainedConfig | None:
    """Return the settings as transformers reads them; None where the architecture is not known.

    Args:
        config: `config.json`.
        text: Words for error texts.

    Raises:
        DataError: The settings contradict each other.
    """
    # Weight arithmetic seldom needs this, and the import takes longer than many an edit.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return None
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(config))
    except BAD_SETTINGS as error:
        raise bad_settings(text, error) from error


def require_language_model(config: Mapping[str, Any], text: str) -> None:
    """Raise unless transformers itself knows the architecture, and it is a causal language model.

    Args:
        config: `config.json`.
        text: The user's own words for the model.

    Raises:
        UnsafeInputError: The model brings code of its own.
        DataError: The architecture is not known, is no language model, or its settings contradict each other.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    parsed = parse_config(config, text)
    if parsed is not None and type(parsed) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    kind = config.get("model_type")
    if config.get("auto_map"):
        raise UnsafeInputError(
            f"'{text}' needs code that comes with the model.",
            expected="an architecture that transformers itself knows",
            found=f"model_type '{kind}' with auto_map in config.json",
            fix="use a version of the model that runs without remote code",
        )
    raise DataError(
        f"'{text}' is not a language model that transformers knows.",
        expected="a causal language model",
        found=f"model_type '{kind}'",
        fix="check config.json; a newer transformers may know this architecture",
    )


def bad_settings(text: str, error: Exception) -> DataError:
    """Return the error for settings from which no model can be built."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return DataError(
        f"transformers cannot build '{text}' from its config.json.",
        expected="the settings of a language model",
        found=lines[-1] if lines else type(error).__name__,
        fix="copy config.json again from where the model came from",
    )
