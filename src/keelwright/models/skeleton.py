# SPDX-License-Identifier: Apache-2.0
"""A model's modules without its weights: which tensor belongs to which kind of layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from keelwright.models.configs import BAD_SETTINGS, bad_settings, parse_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def skeleton(config: Mapping[str, Any], text: str) -> PreTrainedModel | None:
    """Return the model's modules on the meta device, or None where transformers has no such language model.

    Args:
        config: `config.json`.
        text: The user's own words for the model.

    Raises:
        DataError: The settings contradict each other.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    parsed = parse_config(config, text)
    if parsed is None or type(parsed) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(parsed)
    except BAD_SETTINGS as error:
        raise bad_settings(text, error) from error
