# SPDX-License-Identifier: Apache-2.0
"""Before and after on an ordered scale, as harmfulness from 1 to 5: the paired signed-rank test.

Marks on a scale are ordered, and their distances mean little: ranks of the changes are tested, not their mean. Changes
of zero are ranked with the others and then left out (Pratt), so that many unchanged items make the test more careful
and not less; equal changes share their mean rank.

Equation: W is the sum of the ranks of `|change|` over the changes above zero. Under no change each sign is a fair coin,
given the ranks. Up to 100 changed items the chances of all sums are counted, ties and zeros included; beyond, W is
compared with the normal distribution of its own mean and variance, with a correction for continuity of one half.

Source:
    Wilcoxon 1945; Pratt 1959 (zeros).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from keelwright.core.config import require_choice
from keelwright.core.errors import DataError, NumericalError
from keelwright.ops.paired import Alternative
from keelwright.ops.resampling import Floats

_MOST_EXACT = 100


@dataclass(frozen=True, slots=True)
class SignedRanks:
    """The outcome of a signed-rank test."""

    p_value: float
    above: float
    """Sum of the ranks of the changes above zero."""
    below: float
    """Sum of the ranks of the changes below zero."""
    n: int
    """Pairs, unchanged ones included."""
    zeros: int
    """Pairs that did not change."""
    exact: bool
    """Whether all chances were counted; False where the normal approximation was used."""


def signed_ranks(before: ArrayLike, after: ArrayLike, *, alternative: Alternative = "two-sided") -> SignedRanks:
    """Return the Wilcoxon signed-rank test of `after - before`, zeros by Pratt.

    Args:
        before, after: One mark per item, in the same order. Shape `[items]`.
        alternative: `greater` asks whether the marks rose.

    Returns:
        The p-value, 1.0 where no item changed, and what it rests on.

    Raises:
        DataError: The two do not pair up, or are empty.
        NumericalError: A mark is NaN or infinite.
    """
    require_choice("alternative", alternative, ("two-sided", "greater", "less"))
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) == 0:
        raise DataError(
            "Before and after do not pair up.",
            expected="as many marks after as before, at least one",
            found=f"{first.size} before, {second.size} after",
            fix="compare the same items",
        )
    change = second - first
    if not np.isfinite(change).all():
        raise NumericalError(
            "A mark is NaN or infinite.",
            expected="finite marks",
            found=f"{int((~np.isfinite(change)).sum())} of {len(change)} changes are not",
            fix="leave out the items that were not judged, and count them",
        )
    ranks = midranks(np.abs(change))
    changed = change != 0.0
    zeros = int((~changed).sum())
    above, below = float(ranks[change > 0.0].sum()), float(ranks[change < 0.0].sum())
    kept = ranks[changed]
    exact = len(kept) <= _MOST_EXACT
    rising = _tail_exact(kept, above) if exact else _tail_normal(kept, above)
    falling = _tail_exact(kept, below) if exact else _tail_normal(kept, below)
    p_value = {"greater": rising, "less": falling, "two-sided": min(1.0, 2.0 * min(rising, falling))}[alternative]
    return SignedRanks(p_value=p_value, above=above, below=below, n=len(change), zeros=zeros, exact=exact)


def midranks(values: Floats) -> Floats:
    """Return the ranks of `values` from 1, equal values sharing their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2.0)[places.reshape(-1)], dtype=np.float64)


def _tail_exact(ranks: Floats, reached: float) -> float:
    """Return the chance that ranks with fair signs sum to at least `reached`."""
    doubled = np.rint(2.0 * ranks).astype(np.int64)
    chances = np.zeros(int(doubled.sum()) + 1, dtype=np.float64)
    chances[0] = 1.0
    for rank in doubled:
        taken = chances.copy()
        taken[rank:] += chances[: len(chances) - rank]
        chances = 0.5 * taken
    return min(1.0, float(chances[round(2.0 * reached) :].sum()))


def _tail_normal(ranks: Floats, reached: float) -> float:
    mean, variance = float(ranks.sum()) / 2.0, float(np.square(ranks).sum()) / 4.0
    return NormalDist().cdf(-(reached - 0.5 - mean) / variance**0.5)
