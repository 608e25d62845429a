# SPDX-License-Identifier: Apache-2.0
"""Gradient surgery: what one gradient has against another is taken out.

    if <g_u, g_a> < 0:   g_u <- g_u - (<g_u, g_a> / |g_a|^2) g_a

After it, a small step along -g_u does not raise the loss of g_a to first order. Gradients are lists with one tensor
per weight, None for zero, already summed over micro-batches and processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from torch import Tensor

from keelwright.ops.gradients import Gradient, add_scaled, dot

Scope = Literal["global", "tensor"]
"""global: one test on all weights together; tensor: one test per weight, which is another method."""

FLOOR: Final = 1e-8
"""Share of |g_u| below which g_a is no direction but rounding."""


@dataclass(frozen=True, slots=True)
class Surgery:
    """A gradient after surgery, and what was found."""

    gradient: Gradient
    conflicts: float
    """Share of the tests that found a conflict, 0 to 1; under the scope `global` 0 or 1."""
    cosine: float
    """Of the two gradients over all weights, before; 0 where one of them is 0."""


def without_conflict(
    user: Sequence[Tensor | None], alignment: Sequence[Tensor | None], *, scope: Scope = "global", floor: float = FLOOR
) -> Surgery:
    """Return `user` without its part against `alignment`; the very tensors of `user` where there is no conflict.

    Args:
        user: The gradient that is cut.
        alignment: The gradient that is protected; its length does not matter.
        scope: What is tested at a time.
        floor: `alignment` counts as zero where its norm is at most this share of `user`'s.
    """
    cosine = _cosine(user, alignment)
    if scope == "global":
        found, conflict = _cut(list(user), list(alignment), floor)
        return Surgery(found, float(conflict), cosine)
    cuts = [_cut([one], [two], floor) for one, two in zip(user, alignment, strict=True)]
    tested = sum(one is not None and two is not None for one, two in zip(user, alignment, strict=True))
    return Surgery([one[0] for one, _ in cuts], sum(conflict for _, conflict in cuts) / max(1, tested), cosine)


def _cut(user: Gradient, alignment: Gradient, floor: float) -> tuple[Gradient, bool]:
    product, square = float(dot(user, alignment)), float(dot(alignment, alignment))
    if product >= 0.0 or math.sqrt(square) <= floor * math.sqrt(float(dot(user, user))):
        return user, False
    return add_scaled(user, alignment, -product / square), True


def _cosine(user: Sequence[Tensor | None], alignment: Sequence[Tensor | None]) -> float:
    lengths = math.sqrt(float(dot(user, user))) * math.sqrt(float(dot(alignment, alignment)))
    return float(dot(user, alignment)) / lengths if lengths > 0.0 else 0.0
