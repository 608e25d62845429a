# SPDX-License-Identifier: Apache-2.0
"""What every bootstrap here shares: sums by cluster, sums of resampled rows, and the ends of an interval.

A statistic that is a function of column sums needs no resampled data set, only resampled sums. Two exact ways give
them: counts of how often each group was drawn, times the groups; or, where many groups are equal (labels of yes and
no), one multinomial count per distinct group, because the draws cannot tell equal groups apart.

Source:
    Efron 1987 (bias-corrected and accelerated interval); Owen, arXiv 0712.1111 (two crossed factors, the pigeonhole
    bootstrap of McCullagh 2000); Hesterberg, arXiv 1411.5279 (expanded percentiles for few groups).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import ConfigError, DataError
from keelwright.ops.intervals import student_quantile

Floats = NDArray[np.float64]
Codes = NDArray[np.intp]
Interval = Literal["bca", "percentile"]

FEW_CLUSTERS = 20
"""Below this many clusters the bootstrap is too narrow; use a test by cluster and say so."""

_BLOCK_ENTRIES = 1 << 20
_WORTH = 16
"""A multinomial count costs about as much as drawing this many indices."""


def require_settings(interval: str, resamples: int, confidence: float) -> None:
    """Raise `ConfigError` unless the three settings that bootstraps share are usable."""
    require_choice("interval", interval, ("bca", "percentile"))
    require_in_range("confidence", confidence, low=0.0, high=1.0, low_open=True, high_open=True)
    require_in_range("resamples", float(resamples), low=100.0)


def require_spread(count: int, unit: str) -> None:
    """Raise `DataError` unless there are at least two groups to draw from."""
    if count < 2:
        raise DataError(
            f"A bootstrap needs more than one {unit}.",
            expected=f"at least 2 {unit}s, better {FEW_CLUSTERS}",
            found=str(count),
            fix="add items that do not depend on each other; one group has no spread to resample",
        )


def codes_of(clusters: Sequence[Hashable], units: int) -> Codes:
    """Return each unit's cluster as a number from 0, in order of first appearance.

    Raises:
        ConfigError: There is not one cluster id per unit.
    """
    if len(clusters) != units:
        raise ConfigError(
            "Every value needs one cluster id.",
            expected=f"{units} ids",
            found=str(len(clusters)),
            fix="give one id per value",
        )
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(one, len(seen)) for one in clusters], dtype=np.intp)


def sums_by(codes: Codes, columns: Floats) -> Floats:
    """Return the column sums of each cluster.

    Args:
        codes: Cluster number of each unit, 0 to clusters - 1. Shape `[units]`.
        columns: Shape `[units, k]`.

    Returns:
        Shape `[clusters, k]`.
    """
    count = int(codes.max()) + 1
    sums = [np.bincount(codes, weights=column, minlength=count) for column in columns.T]
    return np.stack(sums, axis=1).astype(np.float64)


def distinct_rows(groups: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Return the distinct rows of `groups` in ascending order, and how often each occurs.

    Args:
        groups: Shape `[groups, k]`.

    Returns:
        Shapes `[distinct, k]` and `[distinct]`.
    """
    ordered = groups[np.lexsort(groups.T[::-1])]
    starts = np.ones(len(ordered), dtype=np.bool_)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    places = np.flatnonzero(starts)
    return ordered[places], np.diff(np.append(places, len(ordered)))


def worth_counting(distinct: int, groups: int) -> bool:
    """Whether counts of distinct groups are cheaper to draw than the groups themselves."""
    return distinct * _WORTH <= groups


def multinomial_sums(rows: Floats, counts: NDArray[np.int64], resamples: int, rng: np.random.Generator) -> Floats:
    """Return column sums of resamples, drawn as multinomial counts of the distinct rows.

    Args:
        rows: Distinct rows. Shape `[distinct, k]`.
        counts: How often each occurs; a resample draws as many rows as there are in all. Shape `[distinct]`.
        resamples: Number of resamples.
        rng: Source of the draws.

    Returns:
        Shape `[resamples, k]`.
    """
    n = int(counts.sum())
    block = max(1, _BLOCK_ENTRIES // len(rows))
    sums = np.empty((resamples, rows.shape[1]), dtype=np.float64)
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        sums[start:stop] = rng.multinomial(n, counts / n, size=stop - start) @ rows
    return sums


def drawn_counts(count: int, resamples: int, rng: np.random.Generator) -> Floats:
    """Return how often each of `count` groups was drawn, for `resamples` draws of `count` with replacement.

    Returns:
        Whole numbers. Shape `[resamples, count]`.
    """
    drawn = rng.integers(0, count, size=(resamples, count), dtype=np.int32)
    found = np.empty((resamples, count), dtype=np.float64)
    for row, indices in zip(found, drawn, strict=True):
        row[:] = np.bincount(indices, minlength=count)
    return found


def resampled_sums(groups: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Return column sums of resamples of whole groups, by the cheaper of the two exact ways.

    The order of the groups does not matter: they are sorted first.

    Args:
        groups: Sums of each group. Shape `[groups, k]`.
        resamples: Number of resamples.
        rng: Source of the draws.

    Returns:
        Shape `[resamples, k]`.
    """
    rows, counts = distinct_rows(groups)
    if worth_counting(len(rows), len(groups)):
        return multinomial_sums(rows, counts, resamples, rng)
    ordered = np.repeat(rows, counts, axis=0)
    sums = np.empty((resamples, groups.shape[1]), dtype=np.float64)
    block = max(1, _BLOCK_ENTRIES // len(groups))
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        sums[start:stop] = drawn_counts(len(groups), stop - start, rng) @ ordered
    return sums


def crossed_sums(first: Codes, second: Codes, columns: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Return column sums of resamples of two crossed factors: each is drawn alone, and a unit weighs the product.

    Args:
        first, second: Number of the unit's cluster in either factor. Shape `[units]`.
        columns: Shape `[units, k]`.
        resamples: Number of resamples.
        rng: Source of the draws.

    Returns:
        Shape `[resamples, k]`.
    """
    rows, others = int(first.max()) + 1, int(second.max()) + 1
    places, cell = np.unique(first * others + second, return_inverse=True)
    cells = sums_by(cell.reshape(-1).astype(np.intp), columns)
    of_first, of_second = places // others, places % others
    sums = np.empty((resamples, columns.shape[1]), dtype=np.float64)
    block = max(1, _BLOCK_ENTRIES // max(len(places), rows, others))
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        weights = drawn_counts(rows, stop - start, rng).take(of_first, axis=1)
        weights *= drawn_counts(others, stop - start, rng).take(of_second, axis=1)
        sums[start:stop] = weights @ cells
    return sums


def interval_ends(
    resampled: Floats,
    value: float,
    left_out: Floats,
    *,
    interval: Interval,
    confidence: float,
    groups: int | None = None,
) -> tuple[float, float]:
    """Return the ends of the interval, `value` between them.

    Args:
        resampled: The statistic of each resample. Shape `[resamples]`.
        value: The statistic of what was measured.
        left_out: The statistic without one group each, for the acceleration. Shape `[groups]`.
        interval: `bca` or `percentile`.
        confidence: Two-sided coverage, 0 to 1.
        groups: Number of groups drawn from, to widen the interval by what a bootstrap of few is too narrow: its
            variance lacks the factor `groups / (groups - 1)`, and its tails are normal where Student's belong. None
            leaves it as it is.
    """
    tail = (1.0 - confidence) / 2.0
    if groups is not None:
        tail = NormalDist().cdf(-math.sqrt(groups / (groups - 1)) * student_quantile(1.0 - tail, groups - 1))
        # Of two groups Student's tail is so thin that its complement rounds to 1; the draws end earlier anyway.
        tail = max(tail, 0.5 / len(resampled))
    shares = (tail, 1.0 - tail)
    if interval == "bca":
        shares = _corrected_shares(resampled, value, left_out, tail)
    low, high = (float(end) for end in np.quantile(resampled, shares))
    return min(low, value), max(high, value)


def _corrected_shares(resampled: Floats, value: float, left_out: Floats, tail: float) -> tuple[float, float]:
    """Return the two quantile levels of the bias-corrected and accelerated interval."""
    normal = NormalDist()
    # Ties count by half: means of binary values repeat often, and a strict count would invent a bias.
    below = float((resampled < value).mean() + 0.5 * (resampled == value).mean())
    edge = 0.5 / len(resampled)
    bias = normal.inv_cdf(min(max(below, edge), 1.0 - edge))
    # A figure that needs two groups is not defined without one of two: then there is no acceleration.
    lean = left_out.mean() - left_out if len(left_out) else left_out
    spread = float(np.square(lean).sum())
    acceleration = float((lean**3).sum()) / (6.0 * spread**1.5) if spread > 0.0 else 0.0

    def share(level: float) -> float:
        shifted = bias + normal.inv_cdf(level)
        scale = 1.0 - acceleration * shifted
        return normal.cdf(bias + shifted / scale) if scale > 0.0 else float(level > 0.5)

    return share(tail), share(1.0 - tail)
