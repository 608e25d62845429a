# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of tensors around an origin: `base + sum_i w_i (x_i - base)`, or without a base `sum_i w_i x_i`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from keelwright.ops.combine import weighted_sum

SUM_TOLERANCE = 1e-12
"""Weights whose sum is this near to one are taken to sum to one: they were computed in float64."""

_LARGE = 2.0


def sum_from_base(
    tensors: Sequence[Float[Tensor, "*shape"]],
    weights: Sequence[float],
    base: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Return `base + sum_i weights[i] * (tensors[i] - base)` in the tensors' dtype; without a base the plain sum.

    Entries on which all agree stay to the bit wherever the sum leaves them in place in exact arithmetic.

    Args:
        tensors: At least one; all of one shape, in float32 or float64.
        weights: One per tensor.
        base: The origin.
    """
    rest = 1.0 - math.fsum(weights)
    if abs(rest) <= SUM_TOLERANCE:
        return weighted_sum(tensors, weights, keep_equal=True)
    if base is None:
        return weighted_sum(tensors, weights)
    if max(abs(weight) for weight in (*weights, rest)) > _LARGE:
        # Large weights of opposite sign would cancel to a small move: multiply the differences, not the weights.
        return weighted_sum([tensor - base for tensor in tensors], weights).add_(base)
    return weighted_sum((base, *tensors), (rest, *weights), keep_equal=True)
