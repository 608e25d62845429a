# SPDX-License-Identifier: Apache-2.0
"""One threshold for the whole model: how many of the largest entries of a task vector fall into each tensor.

Two surveys of the model, one for the bin of the wanted magnitude and one for the magnitude itself. Of entries with
exactly that magnitude, those of the tensors that come first by name count as the larger ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keelwright.core.protocols import Chunk, Found, Reach, Stats, TensorEntry
from keelwright.ops.order_statistics import HIGH_BINS, LOW_BINS, find_bin, find_cut, kept_count, magnitude_histogram
from keelwright.weights.edit import Edit
from keelwright.weights.task_vectors import ALIGNED

Sparse = tuple[Tensor, Tensor]
"""Bins that hold something, and what they hold."""


@dataclass(frozen=True, slots=True)
class Counted:
    """What the first survey came to."""

    high: Mapping[str, Mapping[str, Sparse]]
    """By tensor and role."""
    bins: Mapping[str, tuple[int, int]]
    """By role: the bin that holds the wanted magnitude, and how many entries lie in bins above it."""
    ranks: Mapping[str, int]
    """By role: how many entries of the model are kept."""


@dataclass(frozen=True, slots=True)
class MagnitudeSurvey(Edit):
    """Counts the magnitudes of task vectors; with `prefixes`, those within one bin of each role."""

    read: tuple[str, ...]
    """Roles of the method, the base among them."""
    prefixes: Mapping[str, int] | None = None

    def roles(self) -> tuple[str, ...]:
        """Return the roles of the method that asks."""
        return self.read

    def reach(self, name: str) -> Reach:
        """Return REDUCED."""
        return Reach.REDUCED

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return a histogram of each task vector."""
        base = chunk.tensors[ALIGNED]
        return {
            role: magnitude_histogram(
                chunk.tensors[role] - base, prefix=None if self.prefixes is None else self.prefixes[role]
            )
            for role in self.read
            if role != ALIGNED
        }

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> dict[str, Any]:
        """Return the bins that are not empty: a model has hundreds of tensors."""
        return {role: (counts.nonzero().flatten().int(), counts[counts > 0]) for role, counts in sums.items()}


def find_bins(found: Mapping[str, Found], densities: Mapping[str, float]) -> Counted:
    """Return the bin of each role's threshold, from the first survey."""
    bins, ranks = {}, {}
    for role, density in densities.items():
        counts = _dense([one[role] for one in found.values() if role in one], HIGH_BINS)
        ranks[role] = kept_count(density, int(counts.sum()))
        bins[role] = find_bin(counts, ranks[role])
    return Counted(found, bins, ranks)


def share_out(counted: Counted, found: Mapping[str, Found]) -> dict[str, dict[str, int]]:
    """Return how many entries of each tensor are kept, by tensor and role, from the second survey."""
    kept: dict[str, dict[str, int]] = {name: {} for name in found}
    for role, (prefix, above) in counted.bins.items():
        counts = _dense([one[role] for one in found.values() if role in one], LOW_BINS)
        cut = find_cut(prefix, above, counts, counted.ranks[role])
        quota = cut.equal_above
        for name in sorted(found):
            if role not in found[name]:
                kept[name][role] = 0  # a tensor without elements
                continue
            low_bins, low = found[name][role]
            high_bins, high = counted.high[name][role]
            equal = min(quota, int(low[low_bins == (cut.bits & 0x7FFF)].sum()))
            quota -= equal
            inside = int(low[low_bins > (cut.bits & 0x7FFF)].sum())
            kept[name][role] = int(high[high_bins > prefix].sum()) + inside + equal
    return kept


def _dense(parts: list[Sparse], size: int) -> Tensor:
    out = torch.zeros(size, dtype=torch.int64)
    for bins, counts in parts:
        out[bins.long()] += counts
    return out
