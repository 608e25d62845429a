# SPDX-License-Identifier: Apache-2.0
"""Bootstrap of a mean and of a paired change, by item or by cluster, and the cluster's own test.

Resamples are drawn as blocks of indices from a fixed, named stream: the same numbers on every machine, and memory
that does not grow with the number of resamples.

Source:
    Efron 1987 (bias-corrected and accelerated interval); Miller, arXiv 2411.00640 (clustered evaluation items).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from keelwright.core.config import require_choice
from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Estimate
from keelwright.core.seeds import derive_seed
from keelwright.ops.resampling import (
    FEW_CLUSTERS,
    Floats,
    Interval,
    codes_of,
    distinct_rows,
    interval_ends,
    multinomial_sums,
    require_settings,
    require_spread,
    sums_by,
    worth_counting,
)

__all__ = [
    "FEW_CLUSTERS",
    "RESAMPLES",
    "bootstrap_mean",
    "bootstrap_ratio",
    "cluster_permutation",
    "design_effect",
    "exp_estimate",
    "paired_bootstrap",
]

RESAMPLES = 10_000

_BLOCK_ENTRIES = 1 << 20
_EXACT_CLUSTERS = 16
_MANY_GROUPS = 4096
"""From here on equal groups are drawn by their number; below, the stream of single draws is kept."""


def bootstrap_mean(
    values: Sequence[float] | Floats,
    *,
    clusters: Sequence[Hashable] | None = None,
    interval: Interval = "bca",
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Return the mean of `values` with a bootstrap interval.

    Args:
        values: One number per item, any unit.
        clusters: One cluster id per item; whole clusters are drawn. None draws single items.
        interval: `bca` (bias-corrected and accelerated) or `percentile`.
        resamples: Number of resamples.
        confidence: Two-sided coverage, 0 to 1.
        seed: Base seed of the stream of draws.

    Raises:
        DataError: There is nothing to average, or only one item or cluster, which has no spread to resample.
        ConfigError: A setting is out of range.
    """
    sums, sizes = _cluster_sums(np.asarray(values, dtype=np.float64), clusters)
    estimate = bootstrap_ratio(sums, sizes, interval=interval, resamples=resamples, confidence=confidence, seed=seed)
    return replace(estimate, n=len(values))


def bootstrap_ratio(
    sums: Sequence[float] | Floats,
    sizes: Sequence[float] | Floats,
    *,
    interval: Interval = "bca",
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Return `sum(sums) / sum(sizes)` with a bootstrap interval over groups: a mean over groups of unequal size.

    Args:
        sums: Total of each group, any unit.
        sizes: Items of each group, above 0.
        interval, resamples, confidence, seed: As for `bootstrap_mean`.

    Returns:
        The mean per item; `n` counts groups.

    Raises:
        DataError: There are fewer than two groups.
        ConfigError: A setting is out of range, or the two do not pair up.
    """
    require_settings(interval, resamples, confidence)
    sums, sizes = np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if len(sums) != len(sizes):
        raise ConfigError(
            "Every sum needs one size.", expected=f"{len(sums)} sizes", found=str(len(sizes)), fix="give one per group"
        )
    require_spread(len(sums), "item")
    mean = float(sums.sum() / sizes.sum())
    means = _resampled_means(sums, sizes, resamples, seed)
    left_out = np.asarray((sums.sum() - sums) / (sizes.sum() - sizes), dtype=np.float64)
    low, high = interval_ends(means, mean, left_out, interval=interval, confidence=confidence)
    return Estimate(value=mean, low=low, high=high, n=len(sums))


def paired_bootstrap(
    before: Sequence[float] | Floats,
    after: Sequence[float] | Floats,
    *,
    clusters: Sequence[Hashable] | None = None,
    interval: Interval = "bca",
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Return the mean of `after - before` over the same items, with a bootstrap interval over pairs.

    Args:
        before, after: One number per item, in the same order.
        clusters, interval, resamples, confidence, seed: As for `bootstrap_mean`.

    Raises:
        DataError: The two do not pair up, or have one item or one cluster only.
    """
    if len(before) != len(after):
        raise DataError(
            "Before and after do not pair up.",
            expected=f"{len(before)} values after, one per value before",
            found=str(len(after)),
            fix="compare the same items",
        )
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return bootstrap_mean(
        change, clusters=clusters, interval=interval, resamples=resamples, confidence=confidence, seed=seed
    )


def cluster_permutation(
    differences: Sequence[float] | Floats,
    clusters: Sequence[Hashable],
    *,
    alternative: Literal["two-sided", "greater", "less"] = "two-sided",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """Return the p-value of no change, by flipping the sign of whole clusters of paired differences.

    Up to 16 clusters every pattern of signs is counted; beyond that `resamples` random patterns are, and the observed
    one with them, so that the p-value is never zero.

    Args:
        differences: After minus before, one per item.
        clusters: Cluster id of each item.
        alternative: `greater` asks whether the differences are above zero.
        resamples: Random patterns where all would be too many.
        seed: Base seed of those patterns.

    Raises:
        DataError: There is only one cluster.
    """
    require_choice("alternative", alternative, ("two-sided", "greater", "less"))
    sums, _ = _cluster_sums(np.asarray(differences, dtype=np.float64), clusters)
    sums = -sums if alternative == "less" else sums
    observed = float(sums.sum())
    # Sums of equal terms in another order differ by rounding; a tie must count as one.
    slack = 1e-9 * max(1.0, float(np.abs(sums).sum()))
    totals = _flipped_totals(sums, resamples, seed)
    extreme = np.abs(totals) >= abs(observed) - slack if alternative == "two-sided" else totals >= observed - slack
    if len(sums) <= _EXACT_CLUSTERS:
        return float(extreme.mean())
    return float((extreme.sum() + 1) / (len(totals) + 1))


def design_effect(values: Sequence[float] | Floats, clusters: Sequence[Hashable]) -> float:
    """Return the variance of the mean by clusters over its variance by items: 1 means the clusters do not matter.

    Raises:
        DataError: There is only one cluster, or the values do not vary.
    """
    numbers = np.asarray(values, dtype=np.float64)
    sums, sizes = _cluster_sums(numbers, clusters)
    mean = numbers.mean()
    spread = float(np.square(numbers - mean).sum()) / (len(numbers) - 1)
    if spread == 0.0:
        raise DataError(
            "The design effect of values that do not vary is not defined.",
            expected="at least two different values",
            found=f"{len(numbers)} times {mean:g}",
            fix="report the counts without it",
        )
    groups = len(sums)
    between = groups / (groups - 1) * float(np.square(sums - sizes * mean).sum())
    return between / (len(numbers) * spread)


def _cluster_sums(values: Floats, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Return the sum and the size of each cluster, in order of first appearance."""
    if clusters is None:
        sums, sizes = values, np.ones_like(values)
    else:
        found = sums_by(codes_of(clusters, len(values)), np.stack([values, np.ones_like(values)], axis=1))
        sums, sizes = found[:, 0], found[:, 1]
    require_spread(len(sums), "item" if clusters is None else "cluster")
    return sums, sizes


def _resampled_means(sums: Floats, sizes: Floats, resamples: int, seed: int) -> Floats:
    rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "bootstrap")))
    count = len(sums)
    if count >= _MANY_GROUPS:
        rows, counts = distinct_rows(np.stack([sums, sizes], axis=1))
        if worth_counting(len(rows), count):
            totals = multinomial_sums(rows, counts, resamples, rng)
            return np.asarray(totals[:, 0] / totals[:, 1], dtype=np.float64)
    block = max(1, _BLOCK_ENTRIES // count)
    equal = bool((sizes == sizes[0]).all())
    means = np.empty(resamples, dtype=np.float64)
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        drawn = rng.integers(0, count, size=(stop - start, count), dtype=np.int32).astype(np.intp)
        weight = count * sizes[0] if equal else sizes.take(drawn).sum(axis=1)
        means[start:stop] = sums.take(drawn).sum(axis=1) / weight
    return means


def _flipped_totals(sums: Floats, resamples: int, seed: int) -> Floats:
    count = len(sums)
    if count <= _EXACT_CLUSTERS:
        patterns = np.arange(1 << count, dtype=np.int64)
        totals = np.zeros(len(patterns), dtype=np.float64)
        for index, value in enumerate(sums):
            totals += np.where((patterns >> index) & 1, -value, value)
        return totals
    rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "sign flips")))
    if count >= _MANY_GROUPS:
        # The sign of a zero changes nothing, and equal terms are told apart only by how many are flipped.
        rows, counts = distinct_rows(np.abs(sums[sums != 0.0])[:, None])
        if worth_counting(len(rows), count):
            kept = 2.0 * rng.binomial(counts, 0.5, size=(resamples, len(rows))) - counts
            return np.asarray(kept @ rows[:, 0], dtype=np.float64)
    block = max(1, _BLOCK_ENTRIES // count)
    totals = np.empty(resamples, dtype=np.float64)
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        signs = 1.0 - 2.0 * rng.integers(0, 2, size=(stop - start, count), dtype=np.int8)
        totals[start:stop] = signs @ sums
    return totals


def exp_estimate(estimate: Estimate) -> Estimate:
    """Return the estimate of `exp(x)` from that of `x`: a ratio from the interval of a log ratio."""
    return Estimate(
        value=math.exp(estimate.value), low=math.exp(estimate.low), high=math.exp(estimate.high), n=estimate.n
    )
