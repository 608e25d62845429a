# SPDX-License-Identifier: Apache-2.0
"""The paired change of one metric between two audits of the same items.

Each unit is its own control. A rate of independent units is tested by exact McNemar, its interval is Tango's; units
that come in clusters are tested and resampled by cluster; any other metric is tested by swapping the two sides of whole
clusters, its interval is a bootstrap of both sides at once. Where units depend on each other in two crossed ways, as by
instruction and by profile, both are resampled, and the p-value is the largest of three: swaps by either way, and the
crossed interval's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from keelwright.core.errors import DataError
from keelwright.core.records import Estimate, Record
from keelwright.measure.metric import Floats, Metric, Row, dependence, is_binomial
from keelwright.ops.bootstrap import FEW_CLUSTERS, cluster_permutation, design_effect
from keelwright.ops.intervals import normal_quantile, two_sided_z
from keelwright.ops.paired import mcnemar_exact, minimum_detectable_change, paired_difference
from keelwright.ops.ranks import signed_ranks
from keelwright.ops.statistic import paired_statistic, swap_test

Alternative = Literal["two-sided", "greater", "less", "worse", "better"]
"""`greater` and `less` speak of the number; `worse` and `better` of what it means."""

Verdict = Literal["not comparable", "improved", "regressed", "no evidence of change"]

ALPHA = 0.05
POWER = 0.8
EXACT = "exact McNemar"


@dataclass(frozen=True, slots=True)
class Change:
    """The paired change of one metric, after minus before, on the units that both sides have."""

    metric: str
    difference: float
    """In the metric's own unit; of a rate -1 to 1."""
    low: float
    high: float
    """95 % interval of the difference."""
    p_value: float
    p_holm: float
    """Adjusted for the family of metrics compared together; equal to `p_value` for a single one."""
    n: int
    """Pairs."""
    worse: int
    """Units that turned for the worse."""
    better: int
    """Units that turned for the better."""
    test: str
    minimum_detectable_change: float
    """The smallest change that these pairs would have shown with 80 % power at 0.05, in the family that is tested."""
    comparable: bool = True
    """False when the incoherent share moved so much that this metric's change cannot be read."""
    higher_is_better: bool = False
    clusters: int = 0
    """Groups of units that depend on each other; equal to `n` where every unit stands alone."""
    unit: str = "rate"
    design_effect: float | None = None
    """Variance by clusters over variance by units; None where units stand alone or nothing moved."""

    @property
    def verdict(self) -> Verdict:
        """What the change amounts to at 0.05, by the adjusted p-value."""
        if not self.comparable:
            return "not comparable"
        if self.p_holm >= ALPHA:
            return "no evidence of change"
        return "improved" if (self.difference > 0.0) == self.higher_is_better else "regressed"

    @property
    def sentence(self) -> str:
        """The change in one sentence."""
        name = self.metric.replace("_", " ")
        if self.verdict == "not comparable":
            return f"{name}: not comparable, because the share of incoherent answers moved by more than 10 points."
        if self.verdict == "no evidence of change":
            return (
                f"{name}: no evidence of change (p = {self.p_holm:.3g}); {self.n} pairs would have shown "
                f"{self._size(self.minimum_detectable_change)}."
            )
        scale = 1.0 if self.unit == "score" else 100.0
        return (
            f"{name} {self.verdict} by {self._size(abs(self.difference))} "
            f"[{scale * self.low:+.1f}, {scale * self.high:+.1f}] over {self.n} pairs (p = {self.p_holm:.3g})."
        )

    def _size(self, value: float) -> str:
        return f"{value:.2f}" if self.unit == "score" else f"{100 * value:.1f} points"

    def to_mapping(self) -> dict[str, Any]:
        """Return the change as plain values, its verdict included."""
        return {**dataclasses.asdict(self), "verdict": self.verdict}


def change_of(
    metric: Metric, before: Sequence[Record], after: Sequence[Record], *, alternative: Alternative = "two-sided"
) -> Change | None:
    """Return the paired change of one metric; None where no unit is shared, or the metric is not defined on them.

    Args:
        metric: What is compared.
        before, after: One model's records each, made under the same conditions.
        alternative: What the test looks for.
    """
    first, second = metric.rows(before), metric.rows(after)
    shared = [unit for unit in first if unit in second]
    if not shared:
        return None
    rows = [first[unit] for unit in shared]
    pair = _columns(rows), _columns([second[unit] for unit in shared])
    moves = _moves(metric, *pair)
    if moves is None:
        return None
    clusters, seconds = dependence(rows)
    groups = len(set(clusters))
    direction = _direction(alternative, metric)
    try:
        found = _paired(metric, pair, clusters, seconds, direction)
    except DataError:
        # So few units that the metric is undefined in many resamples: nothing can be said of its change.
        return None
    if found is None:
        return None
    estimate, p_value, test, detectable = found
    up, down = int((moves > 0.0).sum()), int((moves < 0.0).sum())
    return Change(
        metric=metric.name,
        difference=estimate.value,
        low=estimate.low,
        high=estimate.high,
        p_value=p_value,
        p_holm=p_value,
        n=len(shared),
        worse=down if metric.higher_is_better else up,
        better=up if metric.higher_is_better else down,
        test=test if alternative == "two-sided" else f"{test}, one-sided",
        minimum_detectable_change=detectable,
        higher_is_better=metric.higher_is_better,
        clusters=groups,
        unit=metric.unit,
        design_effect=_design_effect(moves, clusters),
    )


Direction = Literal["two-sided", "greater", "less"]


def _paired(
    metric: Metric,
    pair: tuple[Floats, Floats],
    clusters: Sequence[str],
    seconds: Sequence[str] | None,
    direction: Direction,
) -> tuple[Estimate, float, str, float] | None:
    """Return change, p-value, name of the test and minimum detectable change."""
    n, groups = len(clusters), len(set(clusters))
    two_sided = direction == "two-sided"
    binomial = is_binomial(metric, pair[0]) and is_binomial(metric, pair[1])
    if binomial and groups == n and seconds is None:
        moves = pair[1][:, 0] - pair[0][:, 0]
        gained, lost = int((moves > 0).sum()), int((moves < 0).sum())
        smallest = minimum_detectable_change(n, (gained + lost) / n, alpha=ALPHA, power=POWER, two_sided=two_sided)
        p_value = mcnemar_exact(gained, lost, alternative=direction)
        return paired_difference(gained, lost, n), p_value, EXACT, smallest
    if groups < 2:
        return None
    few = f", only {groups} of them" if groups < FEW_CLUSTERS else ""
    if seconds is not None:
        estimate = paired_statistic(*pair, metric.value, clusters=clusters, second_clusters=seconds)
        swaps = [swap_test(*pair, metric.value, clusters=one, alternative=direction) for one in (clusters, seconds)]
        # Swaps by one way of depending take the other for independent; the crossed interval does not.
        p_value = max(*swaps, _p_by_interval(estimate, direction))
        test = f"both clusters: largest p of swaps by either and of the crossed bootstrap{few}"
    elif binomial:
        estimate = paired_statistic(*pair, metric.value, clusters=clusters)
        p_value = cluster_permutation(pair[1][:, 0] - pair[0][:, 0], clusters, alternative=direction)
        test = f"sign flips by cluster{few}"
    else:
        estimate = paired_statistic(*pair, metric.value, clusters=clusters)
        if metric.is_ordinal and groups == n:
            p_value = signed_ranks(*(side[:, 0] / side[:, 1] for side in pair), alternative=direction).p_value
            test = "Wilcoxon signed ranks, zeros by Pratt"
        else:
            p_value = swap_test(*pair, metric.value, clusters=clusters, alternative=direction)
            test = f"swaps of both sides{' by cluster' if groups < n else ''}{few}"
    if estimate.low == estimate.high:
        # All moved alike, or none did, so there is nothing to resample: the interval of as many unmoved pairs as there
        # are clusters, on the smaller side of a gap between two kinds of units.
        still = paired_difference(0, 0, _smallest_side(np.abs(pair[0]) + np.abs(pair[1]), clusters))
        most = {"rate": 1.0, "difference": 2.0}.get(metric.unit, np.inf)
        low, high = max(-most, estimate.value + still.low), min(most, estimate.value + still.high)
        estimate = Estimate(estimate.value, low, high, n)
    return estimate, p_value, test, _detectable(estimate, two_sided=two_sided)


def _smallest_side(columns: Floats, clusters: Sequence[str]) -> int:
    """Return the clusters of the smallest kind of units: units are of one kind where their columns are linked."""
    filled = columns != 0.0
    kind = np.arange(filled.shape[1])
    for row in np.unique(filled, axis=0):
        if row.any():
            kind[np.isin(kind, kind[row])] = kind[row].min()
    kinds: dict[int, set[str]] = {}
    for row, cluster in zip(filled, clusters, strict=True):
        if row.any():
            kinds.setdefault(int(kind[row][0]), set()).add(cluster)
    return min((len(one) for one in kinds.values()), default=len(set(clusters)))


def _p_by_interval(estimate: Estimate, direction: Direction) -> float:
    """Return the p-value of no change by an interval's width, as if the change were normal; 1 where it has none."""
    error = (estimate.high - estimate.low) / (2.0 * two_sided_z(0.95))
    if error <= 0.0:
        return 1.0
    above = NormalDist().cdf(-estimate.value / error)
    return {"greater": above, "less": 1.0 - above, "two-sided": 2.0 * min(above, 1.0 - above)}[direction]


def _design_effect(moves: Floats, clusters: Sequence[str]) -> float | None:
    if len(set(clusters)) in (1, len(clusters)) or not np.ptp(moves):
        return None
    return design_effect(moves, clusters)


def _detectable(estimate: Estimate, *, two_sided: bool) -> float:
    """Return the smallest change that an estimate of this precision would show with 80 % power."""
    error = (estimate.high - estimate.low) / (2.0 * two_sided_z(0.95))
    level = two_sided_z(1.0 - ALPHA) if two_sided else normal_quantile(1.0 - ALPHA)
    return (level + normal_quantile(POWER)) * error


def detectable_in(change: Change, family: int) -> float:
    """Return the smallest change that would have shown where Holm adjusts for a family of so many two-sided tests.

    The first rejection of a family has to reach the level over their number.
    """
    level = ALPHA / family
    if change.test == EXACT:
        discordant = (change.worse + change.better) / change.n
        return minimum_detectable_change(change.n, discordant, alpha=level, power=POWER)
    reach = [normal_quantile(1.0 - one / 2.0) + normal_quantile(POWER) for one in (level, ALPHA)]
    return change.minimum_detectable_change * reach[0] / reach[1]


def _columns(rows: Sequence[Row]) -> Floats:
    return np.array([row.columns for row in rows], dtype=np.float64)


def _moves(metric: Metric, before: Floats, after: Floats) -> Floats | None:
    """Return how far each unit moved the metric, to first order; None where the metric is not defined."""
    middle = (before.sum(axis=0) + after.sum(axis=0)) / 2.0
    step = 1e-4 * np.maximum(1.0, np.abs(middle))
    shifted = np.concatenate([middle + np.diag(step), middle - np.diag(step)])
    up, down = np.split(metric.value(shifted), 2)
    slope = (up - down) / (2.0 * step)
    if np.isnan(metric.value(before.sum(axis=0))) or np.isnan(metric.value(after.sum(axis=0))):
        return None
    pushes = (after - before) @ np.nan_to_num(slope)
    return np.where(np.abs(pushes) > 1e-12, pushes, 0.0)


def _direction(alternative: Alternative, metric: Metric) -> Direction:
    if alternative == "worse":
        return "less" if metric.higher_is_better else "greater"
    if alternative == "better":
        return "greater" if metric.higher_is_better else "less"
    return alternative
