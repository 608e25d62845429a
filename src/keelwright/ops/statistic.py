# SPDX-License-Identifier: Apache-2.0
"""Interval, paired change and test of any figure that is a function of sums: the one tool behind every metric.

A metric is `value(sums)`: `sums[..., k]` are column sums over the units, and the answer has the leading axes. A rate
is `s0 / s1` with columns (counted, judged); the difference of two groups of items is `s0 / s1 - s2 / s3`, and so on.
Where it is not defined, as a quotient by zero, `value` returns NaN. One function then serves the estimate, its
bootstrap, its paired change and its test.

Equations (S the column sums, b and a before and after, G clusters):
    bootstrap          value(S*), S* the sums of G clusters drawn with replacement
    two crossed factors  value(sum_i W_row(i) V_column(i) x_i), W and V drawn apart
    paired change      value(S_a) - value(S_b), both sides of a unit drawn together
    swap test          the share of swaps of whole clusters between the sides with at least the change observed

Cost: see `docs/reference/statistics.md`; about half a CPU second for 10,000 resamples of 10,000 clusters that all
differ, much less where labels are yes or no.

Limits: a bootstrap of a handful of clusters is too narrow, though it is widened for their number. The crossed
bootstrap is mildly conservative.

Source:
    Efron 1987; Owen, arXiv 0712.1111; Hesterberg, arXiv 1411.5279 (few groups); Miller, arXiv 2411.00640 (clustered
    evaluation items).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import ConfigError, DataError, NumericalError
from keelwright.core.records import Estimate
from keelwright.core.seeds import derive_seed
from keelwright.ops.paired import Alternative
from keelwright.ops.resampling import (
    Floats,
    Interval,
    codes_of,
    crossed_sums,
    distinct_rows,
    interval_ends,
    require_settings,
    require_spread,
    resampled_sums,
    sums_by,
)

Value = Callable[[Floats], Floats]
"""Column sums `[..., k]` to figures `[...]`; NaN where a figure is not defined."""

RESAMPLES = 10_000

_MOST_UNDEFINED = 0.1
"""Share of resamples that may lack the figure before the interval means nothing."""
_EXACT_BITS = 16.0
_BLOCK_ENTRIES = 1 << 20


def quotient(above: ArrayLike, below: ArrayLike) -> Floats:
    """Return `above / below`, and NaN where `below` is zero."""
    below = np.asarray(below, dtype=np.float64)
    return np.asarray(np.divide(above, np.where(below == 0.0, np.nan, below)), dtype=np.float64)


def ratio(sums: Floats) -> Floats:
    """Return `s0 / s1`: a rate from (counted, judged), or a mean from (sum, size)."""
    return quotient(sums[..., 0], sums[..., 1])


def gap(sums: Floats) -> Floats:
    """Return `s0 / s1 - s2 / s3`: the contrast gap, or any difference of two rates."""
    return np.asarray(ratio(sums[..., :2]) - ratio(sums[..., 2:4]), dtype=np.float64)


def balanced_accuracy(sums: Floats) -> Floats:
    """Return `(s0 / s1 + 1 - s2 / s3) / 2`: the balanced refusal accuracy from unsafe and safe items' refusals."""
    return np.asarray((gap(sums) + 1.0) / 2.0, dtype=np.float64)


def relative_drop(sums: Floats) -> Floats:
    """Return `(s0 - s1) / s0`: the share of `s0` that is lost."""
    return quotient(sums[..., 0] - sums[..., 1], sums[..., 0])


def harmonic_mean(sums: Floats) -> Floats:
    """Return the harmonic mean of the rates `s0 / s1` and `s2 / s3`; zero when both are."""
    first, second = ratio(sums[..., :2]), ratio(sums[..., 2:4])
    both = first + second
    return np.asarray(np.where(both == 0.0, 0.0, quotient(2.0 * first * second, both)), dtype=np.float64)


def bootstrap_statistic(
    columns: ArrayLike,
    value: Value,
    *,
    clusters: Sequence[Hashable] | None = None,
    second_clusters: Sequence[Hashable] | None = None,
    interval: Interval = "bca",
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Return the statistic `value` of the column sums with a bootstrap interval.

    The interval is widened for few clusters, by Student's t in place of the normal quantile (`bootstrap_mean` is not).
    The order of the units changes nothing, unless two factors are crossed.

    Args:
        columns: What is summed, per unit. Shape `[units, k]`.
        value: The statistic as a function of sums, vectorised over leading axes.
        clusters: One id per unit; whole clusters are drawn. None draws single units.
        second_clusters: One id per unit of a factor crossed with the first, as a template that is asked of every
            behaviour: both are drawn, and a unit weighs the product of the two counts.
        interval: `bca` or `percentile`. With two factors the acceleration comes from leaving out clusters of either.
        resamples: Number of resamples, at least 100. Those without the statistic are left out.
        confidence: Two-sided coverage, 0 to 1.
        seed: Base seed of the stream of draws.

    Returns:
        The statistic in its own unit; `n` counts units.

    Raises:
        DataError: There is one unit or cluster only, or the statistic is not defined on these units or on more than a
            tenth of the resamples.
        ConfigError: A setting is out of range, or ids do not pair up with units.
        NumericalError: A column holds NaN or infinity.
    """
    require_settings(interval, resamples, confidence)
    table = _table("columns", columns)
    point = _point(value, table)
    rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "statistic")))
    codes = None if clusters is None else codes_of(clusters, len(table))
    drawn_from: int | None
    if second_clusters is None:
        groups = table if codes is None else sums_by(codes, table)
        require_spread(len(groups), "item" if codes is None else "cluster")
        drawn, drawn_from = resampled_sums(groups, resamples, rng), len(groups)
    else:
        if codes is None:
            raise ConfigError(
                "A second factor needs a first.",
                expected="clusters and second_clusters",
                found="second_clusters only",
                fix="give the single factor as clusters",
            )
        others = codes_of(second_clusters, len(table))
        parts = [sums_by(one, table) for one in (codes, others)]
        for part in parts:
            require_spread(len(part), "cluster")
        groups = np.concatenate(parts)
        # Two crossed draws vary a little too much already; their interval is not widened for few clusters.
        drawn, drawn_from = crossed_sums(codes, others, table, resamples, rng), None
    found = _defined(value(drawn))
    left_out = np.asarray(value(table.sum(axis=0) - groups), dtype=np.float64)
    low, high = interval_ends(
        found, point, left_out[np.isfinite(left_out)], interval=interval, confidence=confidence, groups=drawn_from
    )
    return Estimate(value=point, low=low, high=high, n=len(table))


def paired_statistic(
    before: ArrayLike,
    after: ArrayLike,
    value: Value,
    *,
    clusters: Sequence[Hashable] | None = None,
    second_clusters: Sequence[Hashable] | None = None,
    interval: Interval = "bca",
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Return `value(after) - value(before)` over the same units, both sides of a unit drawn together.

    Args:
        before, after: What is summed, per unit, in the same order. Shape `[units, k]` each.
        value, clusters, second_clusters, interval, resamples, confidence, seed: As for `bootstrap_statistic`.

    Returns:
        The change in the statistic's unit; `n` counts units.

    Raises:
        DataError: The two sides do not pair up, or as for `bootstrap_statistic`.
        ConfigError: As for `bootstrap_statistic`.
        NumericalError: A column holds NaN or infinity.
    """
    first, second = _pair(before, after)
    k = first.shape[1]

    def change(sums: Floats) -> Floats:
        return np.asarray(value(sums[..., k:]) - value(sums[..., :k]), dtype=np.float64)

    return bootstrap_statistic(
        np.concatenate([first, second], axis=1),
        change,
        clusters=clusters,
        second_clusters=second_clusters,
        interval=interval,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )


def swap_test(
    before: ArrayLike,
    after: ArrayLike,
    value: Value,
    *,
    clusters: Sequence[Hashable] | None = None,
    alternative: Alternative = "two-sided",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """Return the p-value of no change in a statistic, by swapping whole clusters between before and after.

    Clusters that did not change play no part, and equal ones are swapped by their number: where that leaves at most
    65,536 cases, as with up to 16 changed clusters or with any few hundred changed labels, all are counted with their
    exact chances. Otherwise random swaps are, and the observed sides with them, so that the p-value is never zero. A
    swap that leaves the statistic undefined counts as extreme.

    Args:
        before, after: What is summed, per unit, in the same order. Shape `[units, k]` each.
        value: The statistic as a function of sums, vectorised over leading axes.
        clusters: One id per unit; None swaps single units.
        alternative: `greater` asks whether the statistic grew.
        resamples: Random swaps where all would be too many, at least 100.
        seed: Base seed of those swaps.

    Raises:
        DataError: The two sides do not pair up, there is one unit or cluster only, or the statistic is not defined.
        ConfigError: A setting is out of range, or ids do not pair up with units.
        NumericalError: A column holds NaN or infinity.
    """
    require_choice("alternative", alternative, ("two-sided", "greater", "less"))
    require_in_range("resamples", float(resamples), low=100.0)
    first, second = _pair(before, after)
    moves = second - first
    if clusters is not None:
        moves = sums_by(codes_of(clusters, len(moves)), moves)
    require_spread(len(moves), "item" if clusters is None else "cluster")
    totals = first.sum(axis=0), second.sum(axis=0)
    sides = [_point(value, one) for one in (first, second)]
    moves = moves[(moves != 0.0).any(axis=1)]
    if len(moves) == 0:
        return 1.0
    rows, counts = distinct_rows(moves)
    exact = float(np.log2(counts + 1.0).sum()) <= _EXACT_BITS
    swapped, chances = _all_swaps(rows, counts) if exact else _random_swaps(rows, counts, resamples, seed)
    found = np.asarray(value(totals[1] - swapped) - value(totals[0] + swapped), dtype=np.float64)
    observed = sides[1] - sides[0]
    # The same statistic summed in another order differs by rounding; a tie must count as one.
    slack = 1e-9 * (abs(sides[0]) + abs(sides[1]))
    if alternative == "two-sided":
        inside = np.abs(found) < abs(observed) - slack
    else:
        inside = found < observed - slack if alternative == "greater" else found > observed + slack
    outside = ~inside
    if exact:
        return min(1.0, float(chances[outside].sum()))
    return float((outside.sum() + 1) / (len(found) + 1))


def _all_swaps(rows: Floats, counts: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return the sums that change sides in every distinguishable swap, and the chance of each."""
    swapped = np.zeros((1, rows.shape[1]), dtype=np.float64)
    chances = np.ones(1, dtype=np.float64)
    for row, count in zip(rows, counts, strict=True):
        binomial = np.ones(1, dtype=np.float64)
        for _ in range(int(count)):
            binomial = 0.5 * (np.append(binomial, 0.0) + np.insert(binomial, 0, 0.0))
        steps = np.arange(int(count) + 1)[:, None] * row
        swapped = (swapped[:, None, :] + steps).reshape(-1, rows.shape[1])
        chances = (chances[:, None] * binomial).reshape(-1)
    return swapped, chances


def _random_swaps(rows: Floats, counts: NDArray[np.int64], resamples: int, seed: int) -> tuple[Floats, Floats]:
    rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "swaps")))
    swapped = np.empty((resamples, rows.shape[1]), dtype=np.float64)
    block = max(1, _BLOCK_ENTRIES // len(rows))
    single = bool((counts == 1).all())
    for start in range(0, resamples, block):
        size = (min(start + block, resamples) - start, len(rows))
        # One fair bit per cluster where no two are equal: cheaper than a binomial count each.
        moved = rng.integers(0, 2, size=size, dtype=np.int8) if single else rng.binomial(counts, 0.5, size=size)
        swapped[start : start + size[0]] = moved.astype(np.float64) @ rows
    return swapped, np.empty(0, dtype=np.float64)


def _table(name: str, columns: ArrayLike) -> Floats:
    table = np.asarray(columns, dtype=np.float64)
    if table.ndim != 2:
        raise ConfigError(
            f"'{name}' must have one row per unit and one column per sum.",
            expected="shape [units, k]",
            found=f"shape {list(table.shape)}",
            fix="stack the columns, as numpy.stack([counted, judged], axis=1)",
        )
    if not np.isfinite(table).all():
        raise NumericalError(
            f"'{name}' holds NaN or infinity.",
            expected="finite numbers",
            found=f"{int((~np.isfinite(table)).any(axis=1).sum())} such rows of {len(table)}",
            fix="leave out what was not judged before summing, and count it",
        )
    return table


def _pair(before: ArrayLike, after: ArrayLike) -> tuple[Floats, Floats]:
    first, second = _table("before", before), _table("after", after)
    if first.shape != second.shape:
        raise DataError(
            "Before and after do not pair up.",
            expected=f"shape {list(first.shape)} on both sides",
            found=f"shape {list(second.shape)} after",
            fix="compare the same items",
        )
    return first, second


def _point(value: Value, table: Floats) -> float:
    point = float(np.asarray(value(table.sum(axis=0)[None, :])).reshape(-1)[0])
    if not np.isfinite(point):
        raise DataError(
            "The statistic is not defined on these units.",
            expected="a finite number",
            found=f"{point:g} from {len(table)} units",
            fix="report it as not measured; is a denominator empty?",
        )
    return point


def _defined(found: Floats) -> Floats:
    kept = np.asarray(found, dtype=np.float64)
    kept = kept[np.isfinite(kept)]
    if len(kept) < (1.0 - _MOST_UNDEFINED) * len(found):
        raise DataError(
            "The statistic is undefined on too many resamples for an interval.",
            expected=f"at most {_MOST_UNDEFINED:.0%} of them",
            found=f"{len(found) - len(kept)} of {len(found)}",
            fix="add units: a denominator rests on one or two of them",
        )
    return kept
