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
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Estimate
from keelwright.core.seeds import derive_seed

Floats = NDArray[np.float64]
Interval = Literal["bca", "percentile"]

RESAMPLES = 10_000
FEW_CLUSTERS = 20
"""Below this many clusters the bootstrap is too narrow; use `cluster_permutation` and say so."""

_BLOCK_ENTRIES = 1 << 20
_EXACT_CLUSTERS = 16


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
    require_choice("interval", interval, ("bca", "percentile"))
    require_in_range("confidence", confidence, low=0.0, high=1.0, low_open=True, high_open=True)
    require_in_range("resamples", float(resamples), low=100.0)
    sums, sizes = np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if len(sums) != len(sizes):
        raise ConfigError(
            "Every sum needs one size.", expected=f"{len(sums)} sizes", found=str(len(sizes)), fix="give one per group"
        )
    _require_spread(len(sums), "item")
    mean = float(sums.sum() / sizes.sum())
    means = _resampled_means(sums, sizes, resamples, seed)
    tail = (1.0 - confidence) / 2.0
    low_share, high_share = tail, 1.0 - tail
    if interval == "bca":
        low_share, high_share = _corrected_shares(means, mean, _jackknife(sums, sizes), tail)
    low, high = (float(end) for end in np.quantile(means, [low_share, high_share]))
    return Estimate(value=mean, low=min(low, mean), high=max(high, mean), n=len(sums))


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
        if len(clusters) != len(values):
            raise ConfigError(
                "Every value needs one cluster id.",
                expected=f"{len(values)} ids",
                found=str(len(clusters)),
                fix="give one id per value",
            )
        seen: dict[Hashable, int] = {}
        codes = np.array([seen.setdefault(one, len(seen)) for one in clusters], dtype=np.int64)
        sums = np.bincount(codes, weights=values, minlength=len(seen)).astype(np.float64)
        sizes = np.bincount(codes, minlength=len(seen)).astype(np.float64)
    _require_spread(len(sums), "item" if clusters is None else "cluster")
    return sums, sizes


def _require_spread(count: int, unit: str) -> None:
    if count < 2:
        raise DataError(
            f"A bootstrap needs more than one {unit}.",
            expected=f"at least 2 {unit}s, better {FEW_CLUSTERS}",
            found=str(count),
            fix="add items that do not depend on each other; one group has no spread to resample",
        )


def _resampled_means(sums: Floats, sizes: Floats, resamples: int, seed: int) -> Floats:
    rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "bootstrap")))
    count = len(sums)
    rows = max(1, _BLOCK_ENTRIES // count)
    equal = bool((sizes == sizes[0]).all())
    means = np.empty(resamples, dtype=np.float64)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        drawn = rng.integers(0, count, size=(stop - start, count), dtype=np.int32)
        weight = count * sizes[0] if equal else sizes[drawn].sum(axis=1)
        means[start:stop] = sums[drawn].sum(axis=1) / weight
    return means


def _jackknife(sums: Floats, sizes: Floats) -> Floats:
    return np.asarray((sums.sum() - sums) / (sizes.sum() - sizes), dtype=np.float64)


def _corrected_shares(means: Floats, mean: float, left_out: Floats, tail: float) -> tuple[float, float]:
    """Return the two quantile levels of the bias-corrected and accelerated interval."""
    normal = NormalDist()
    # Ties count by half: means of binary values repeat often, and a strict count would invent a bias.
    below = float((means < mean).mean() + 0.5 * (means == mean).mean())
    edge = 0.5 / len(means)
    bias = normal.inv_cdf(min(max(below, edge), 1.0 - edge))
    lean = left_out.mean() - left_out
    spread = float(np.square(lean).sum())
    acceleration = float((lean**3).sum()) / (6.0 * spread**1.5) if spread > 0.0 else 0.0

    def share(level: float) -> float:
        shifted = bias + normal.inv_cdf(level)
        scale = 1.0 - acceleration * shifted
        return normal.cdf(bias + shifted / scale) if scale > 0.0 else float(level > 0.5)

    return share(tail), share(1.0 - tail)


def _flipped_totals(sums: Floats, resamples: int, seed: int) -> Floats:
    count = len(sums)
    if count <= _EXACT_CLUSTERS:
        patterns = np.arange(1 << count, dtype=np.int64)
        totals = np.zeros(len(patterns), dtype=np.float64)
        for index, value in enumerate(sums):
            totals += np.where((patterns >> index) & 1, -value, value)
        return totals
    rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "sign flips")))
    rows = max(1, _BLOCK_ENTRIES // count)
    totals = np.empty(resamples, dtype=np.float64)
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        signs = 1.0 - 2.0 * rng.integers(0, 2, size=(stop - start, count), dtype=np.int8)
        totals[start:stop] = signs @ sums
    return totals


def exp_estimate(estimate: Estimate) -> Estimate:
    """Return the estimate of `exp(x)` from that of `x`: a ratio from the interval of a log ratio."""
    return Estimate(
        value=math.exp(estimate.value), low=math.exp(estimate.low), high=math.exp(estimate.high), n=estimate.n
    )
