# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of tensors, and sums of weighted task vectors under a sign election."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.ops.kernels import floats, pointers, usable

Election = Literal["none", "mass", "count"]
"""none: every entry takes part; mass: those with the sign of the sum; count: those with the sign of the majority."""

_ELECTIONS: tuple[Election, ...] = ("none", "mass", "count")
_NO_WEIGHT = 1e-8


def weighted_sum(
    tensors: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float], *, keep_equal: bool = False
) -> Float[Tensor, "*shape"]:
    """Return `sum_i weights[i] * tensors[i]`, added in the order given, each step rounded to the tensors' dtype.

    Args:
        tensors: At least one; all of one shape, in float32 or float64.
        weights: One per tensor.
        keep_equal: Take entries on which all tensors agree over as they are. For weights that sum to one: rounding
            could move such an entry by one unit in the last place.
    """
    out = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    library = usable(*tensors, out)
    if library is not None:
        library.kw_weighted_sum(
            len(tensors), pointers(tensors), floats(weights), out.numel(), int(keep_equal), out.data_ptr()
        )
        return out
    torch.mul(tensors[0], _rounded(weights[0], out), out=out)
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        # Two roundings on purpose: torch's fused form would give other bits on some machines.
        out.add_(torch.mul(tensor, _rounded(weight, out)))
    if keep_equal:
        same = torch.ones_like(out, dtype=torch.bool)
        for tensor in tensors[:-1]:
            same &= tensor == tensors[-1]
        out = torch.where(same, tensors[-1], out)
    return out


def elected_sum(
    vectors: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float], *, elect: Election, normalize: bool
) -> Float[Tensor, "*shape"]:
    """Return the sum of weighted task vectors, over those entries that agree with the elected sign.

    Args:
        vectors: Task vectors times their weights, one per model; float32 or float64.
        weights: The weights, which `normalize` divides out again.
        elect: How the sign is chosen; a tie is plus, and a zero never agrees.
        normalize: Divide by the sum of the weights that took part; a sum of 0 counts as 1.

    Source:
        TIES-Merging, arXiv 2306.01708, section 3.
    """
    out = torch.empty_like(vectors[0], memory_format=torch.contiguous_format)
    library = usable(*vectors, out)
    if library is not None:
        library.kw_elect(
            len(vectors), pointers(vectors), floats(weights), out.numel(), _ELECTIONS.index(elect), int(normalize),
            out.data_ptr(),
        )  # fmt: skip
        return out
    out.zero_()
    if elect == "none":
        for vector in vectors:
            out.add_(vector)
        total = torch.zeros((), dtype=out.dtype)
        for weight in weights:
            total += _rounded(weight, out)
        return out.div_(total if abs(float(total)) >= _NO_WEIGHT else 1.0) if normalize else out
    mass, share = torch.zeros_like(out), torch.zeros_like(out)
    for vector in vectors:
        mass += vector if elect == "mass" else vector.sign()
    for vector, weight in zip(vectors, weights, strict=True):
        agrees = torch.where(mass >= 0.0, vector > 0.0, vector < 0.0)
        out += torch.where(agrees, vector, 0.0)
        share += torch.where(agrees, _rounded(weight, out), 0.0)
    return out.div_(torch.where(share == 0.0, 1.0, share)) if normalize else out


def _rounded(weight: float, like: Tensor) -> float:
    """Return the weight as the arithmetic's own dtype holds it."""
    return float(torch.tensor(weight, dtype=like.dtype))
