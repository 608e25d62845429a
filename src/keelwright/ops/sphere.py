# SPDX-License-Identifier: Apache-2.0
"""Great circles: the weights of two vectors whose sum is a point on the arc between them.

Everything is computed from dot products in float64; unit vectors are never formed.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def arc_weights(cosine: float, t: float) -> tuple[float, float]:
    """Return `sin((1 - t) W) / sin W` and `sin(t W) / sin W` for the angle `W` with this cosine.

    >>> [round(weight, 6) for weight in arc_weights(0.0, 0.5)]
    [0.707107, 0.707107]

    Args:
        cosine: Of the angle between the vectors, inside (-1, 1).
        t: Place on the arc: 0 is the first vector, 1 the second; other numbers go beyond them.

    Source:
        Shoemake: Animating Rotation with Quaternion Curves, SIGGRAPH 1985.
    """
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def many_arc_weights(
    cosines: Float[Tensor, "*vectors"], t: float, is_linear: Bool[Tensor, "*vectors"]
) -> tuple[Float[Tensor, "*vectors"], Float[Tensor, "*vectors"]]:
    """Return `arc_weights` of many pairs of vectors; where `is_linear` says so, `1 - t` and `t`.

    Args:
        cosines: In float64.
        t: Place on the arc.
        is_linear: Pairs that have no arc.
    """
    angles = torch.acos(torch.where(is_linear, 0.0, cosines))
    sines = torch.sin(angles)
    first = torch.where(is_linear, 1.0 - t, torch.sin((1.0 - t) * angles) / sines)
    return first, torch.where(is_linear, t, torch.sin(t * angles) / sines)
