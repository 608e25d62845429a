# SPDX-License-Identifier: Apache-2.0
"""Exact thresholds by magnitude in O(n), without sorting: two histograms over the bits of the values.

The magnitude of a float32 is a 31-bit whole number in the same order. The first histogram counts its high 16 bits, the
second the low 15 bits within the one bin that holds the wanted rank; both add up over chunks. Among equal magnitudes
those of the lowest flat index come first, so that a count is met exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from keelwright.ops.kernels import usable

HIGH_BINS, LOW_BINS = 1 << 16, 1 << 15
_NONE, _EVERY = 0xFFFFFFFF, (1 << 62)


@dataclass(frozen=True, slots=True)
class Cut:
    """A place in the order of magnitudes: how many of the equal ones, by flat index, belong to the upper side."""

    bits: int
    """Magnitude bits at the cut."""
    equal_above: int
    """Of the values with exactly these bits, how many (the lowest indices) count as above."""
    equal: int
    """How many values have exactly these bits."""


def magnitude_histogram(values: Float[Tensor, " n"], *, prefix: int | None = None) -> Int[Tensor, " bins"]:
    """Return counts of `|values|` by the high 16 magnitude bits, or of those with the high bits `prefix` by the low 15.

    Args:
        values: float32. Other dtypes are converted first, so the order is that of their float32 values.
        prefix: The bin of the first histogram to look into.
    """
    values = values.float().contiguous()
    out = torch.zeros(HIGH_BINS if prefix is None else LOW_BINS, dtype=torch.int64)
    library = usable(values)
    if library is not None:
        library.kw_histogram(values.data_ptr(), values.numel(), int(prefix is not None), prefix or 0, out.data_ptr())
        return out
    bits = values.view(torch.int32) & 0x7FFFFFFF
    if prefix is None:
        return torch.bincount(bits >> 15, minlength=HIGH_BINS)
    return torch.bincount(bits[bits >> 15 == prefix] & 0x7FFF, minlength=LOW_BINS)


def find_bin(counts: Int[Tensor, " bins"], rank: int) -> tuple[int, int]:
    """Return the bin that holds the `rank`-th largest value (1 is the largest), and how many values lie in bins above.

    Args:
        counts: Values per bin, in growing order of magnitude.
        rank: From 1 to the number of values.
    """
    above = torch.flip(torch.cumsum(torch.flip(counts, (0,)), 0), (0,))
    index = int((above >= rank).nonzero()[-1, 0])
    return index, int(above[index]) - int(counts[index])


def find_cut(high_bin: int, above_bin: int, low_counts: Int[Tensor, " bins"], rank: int) -> Cut:
    """Return the cut that leaves exactly `rank` values on its upper side.

    Args:
        high_bin: The bin of the first histogram that holds the rank.
        above_bin: Values in the bins above it.
        low_counts: The second histogram, within that bin.
        rank: Number of values above the cut.
    """
    low, above = find_bin(low_counts, rank - above_bin)
    return Cut((high_bin << 15) | low, rank - above_bin - above, int(low_counts[low]))


def value_of(cut: Cut) -> float:
    """Return the magnitude at a cut."""
    return float(torch.tensor(cut.bits, dtype=torch.int32).view(torch.float32))


def equal_indices(values: Float[Tensor, " n"], cut: Cut) -> Int[Tensor, " equal"]:
    """Return the indices, within this run, of the values whose magnitude is exactly that of the cut."""
    return ((values.float().view(torch.int32) & 0x7FFFFFFF) == cut.bits).nonzero().flatten()


def keep_between(
    values: Float[Tensor, " n"],
    *,
    offset: int,
    low: Cut | None = None,
    low_until: int | None = None,
    high: Cut | None = None,
    high_from: int | None = None,
    scale: float = 1.0,
) -> Float[Tensor, " n"]:
    """Return `values * scale` where the magnitude is above `low` and not above `high`, 0 elsewhere.

    Args:
        values: A run of the flattened tensor; the magnitudes compared are those in float32.
        offset: Flat index of its first element.
        low: What is kept is above this cut. None: no lower limit.
        low_until: Flat index from which values equal to `low` are dropped. None: all equal ones are kept.
        high: What is above this cut is dropped. None: no upper limit.
        high_from: Flat index from which values equal to `high` are kept. None: none of the equal ones is dropped.
        scale: What is kept is multiplied with it.
    """
    low_bits, low_limit = (0, _EVERY) if low is None else (low.bits, _EVERY if low_until is None else low_until)
    high_bits, high_start = (_NONE, 0) if high is None else (high.bits, 0 if high_from is None else high_from)
    out = torch.empty_like(values)
    library = usable(values, out)
    if library is not None:
        library.kw_keep_between(
            values.data_ptr(), values.numel(), offset, low_bits, low_limit, high_bits, high_start, scale, out.data_ptr()
        )
        return out
    bits = (values.float().view(torch.int32) & 0x7FFFFFFF).to(torch.int64)
    index = torch.arange(offset, offset + values.numel())
    keep = (bits > low_bits) | ((bits == low_bits) & (index < low_limit))
    keep &= (bits < high_bits) | ((bits == high_bits) & (index >= high_start))
    factor = scale if values.dtype is torch.float64 else float(np.float32(scale))
    return torch.where(keep, values * factor, 0.0)


def kept_count(density: float, elements: int) -> int:
    """Return how many entries a density keeps: the whole part of the product, at least one of a non-empty tensor."""
    return min(elements, max(1, math.trunc(density * elements))) if elements else 0
