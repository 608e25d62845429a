# SPDX-License-Identifier: Apache-2.0
"""The builder `continuations`: prompts that the model goes on with, as text and not as a request.

The prompt is the whole text (the part is decoded `as_is`, without a chat template). The published protocol draws 25
continuations of at most 20 tokens by nucleus sampling with p = 0.9 at temperature 1.

Source:
    Gehman et al., RealToxicityPrompts, arXiv 2009.11462.
"""

from __future__ import annotations

import dataclasses

from keelwright.core.errors import ConfigError
from keelwright.measure.builders import plain
from keelwright.measure.builders.drawing import Load
from keelwright.measure.metric_table import answers_needed
from keelwright.measure.part import Drawn, PartSpec


def build(spec: PartSpec, load: Load, *, limit: int | None, seed: int) -> Drawn:
    """Return the sets' prompts, without a system message.

    Args:
        spec: The part.
        load: Reads a set by name.
        limit: At most this many items of each kind and set; None keeps all.
        seed: Of the draw.

    Raises:
        ConfigError: A metric needs more continuations of each prompt than the part draws.
    """
    for metric in spec.metrics:
        if answers_needed(metric) > spec.samples:
            raise ConfigError(
                f"The metric '{metric}' needs more continuations than are drawn.",
                expected=f"at least {answers_needed(metric)} samples",
                found=f"{spec.samples}",
                fix=f"draw more samples, or ask for {metric.rpartition('_')[0]}_{spec.samples}",
            )
    drawn = plain.build(spec, load, limit=limit, seed=seed)
    return dataclasses.replace(drawn, items=tuple(dataclasses.replace(item, system=None) for item in drawn.items))
