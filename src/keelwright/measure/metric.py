# SPDX-License-Identifier: Apache-2.0
"""A metric: what it counts of each unit of analysis, and the value that the sums of those counts come to.

A unit is an item, or a question that several items are sides of. Each contributes a row of numbers; the value is a
function of the sums of the rows over all units. So one bootstrap, one paired test and one minimum detectable change
serve a plain rate, a gap between two rates, a harmonic mean and a relative loss alike.

| metric | rows | value |
|---|---|---|
| a rate | (counted, 1) | s0 / s1 |
| contrast gap | (refused, 1, 0, 0) or (0, 0, refused, 1) | s0 / s1 - s2 / s3 |
| relative loss | (clean, attacked) | (s0 - s1) / s0 |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from keelwright.core.errors import DataError
from keelwright.core.records import Estimate, Record
from keelwright.ops.bootstrap import FEW_CLUSTERS
from keelwright.ops.intervals import wilson
from keelwright.ops.statistic import bootstrap_statistic

Floats: TypeAlias = NDArray[np.float64]

Unit = Literal["rate", "score", "ratio", "difference"]
"""How a value is read: a share in 0..1, a mean on the judge's own scale, a quotient, a difference of shares."""


class Row(NamedTuple):
    """What one unit contributes."""

    columns: tuple[float, ...]
    cluster: str
    """Units with the same cluster are not independent; the unit's own id where it stands alone."""
    second: str = ""
    """A second way in which units depend on each other, such as a shared profile."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One number that an audit prints."""

    name: str
    title: str
    counts: str
    """What it counts, in words that stand in a table."""
    higher_is_better: bool
    rows: Callable[[Sequence[Record]], Mapping[str, Row]]
    """Rows by unit id, from one model's records; empty where no record counts."""
    value: Callable[[Floats], Floats]
    """From sums `[..., columns]` to values `[...]`; NaN where it is not defined."""
    unit: Unit = "rate"
    is_binary: bool = False
    """Each row is (0 or 1, 1): a binomial, with exact tests."""
    is_ordinal: bool = False
    """Values are grades, not amounts: single units are tested by signed ranks."""

    def estimate(self, records: Sequence[Record], *, seed: int = 0) -> Estimate | None:
        """Return the value with its 95 % interval over the records of one model; None where it is not defined.

        Wilson for a rate of independent units; a cluster bootstrap otherwise, and Wilson over clusters where every unit
        agrees and there is nothing to resample.
        """
        return estimate_rows(self, list(self.rows(records).values()), seed=seed)


def estimate_rows(metric: Metric, rows: Sequence[Row], *, seed: int = 0) -> Estimate | None:
    """Return the value of a metric over rows, with its 95 % interval; None where it is not defined."""
    if not rows:
        return None
    columns = np.array([row.columns for row in rows], dtype=np.float64)
    value = float(metric.value(columns.sum(axis=0)))
    if np.isnan(value):
        return None
    clusters, seconds = dependence(rows)
    groups = min(len(set(one)) for one in (clusters, seconds) if one is not None)
    if is_binomial(metric, columns) and (groups == len(rows) or value in (0.0, 1.0)):
        plain = wilson(round(value * groups), groups)
        return Estimate(value, plain.low, plain.high, len(rows))
    if groups < 2:
        return None
    try:
        found = bootstrap_statistic(columns, metric.value, clusters=clusters, second_clusters=seconds, seed=seed)
    except DataError:
        # So few units that the metric is undefined in many resamples: there is no interval to show, so no figure.
        return None
    return found if found.low < found.high else _widened(metric, found, rows)


def _widened(metric: Metric, found: Estimate, rows: Sequence[Row]) -> Estimate:
    """Return the interval of units that all agree, which resampling makes a point: Wilson's over the smallest group."""
    groups: dict[tuple[float, ...], set[str]] = {}
    for row in rows:
        groups.setdefault(row.columns, set()).add(row.cluster)
    room = wilson(0, min(len(one) for one in groups.values())).high
    low, high = {"rate": (0.0, 1.0), "difference": (-1.0, 1.0)}.get(metric.unit, (-np.inf, np.inf))
    return Estimate(found.value, max(low, found.value - room), min(high, found.value + room), found.n)


def is_binomial(metric: Metric, columns: Floats) -> bool:
    """Whether each unit says yes or no; the mean of several samples does not."""
    return metric.is_binary and bool(np.isin(columns[:, 0], (0.0, 1.0)).all())


def dependence(rows: Sequence[Row]) -> tuple[list[str], list[str] | None]:
    """Return the rows' clusters, and their second ones or None where there is only one way to depend on each other.

    A way in which every row stands alone is left out, and so is a second one of fewer than 20 clusters: too few to draw
    from.
    """
    first, second = [row.cluster for row in rows], [row.second for row in rows]
    if not FEW_CLUSTERS <= len(set(second)) < len(rows):
        return first, None
    return (second, None) if len(set(first)) == len(rows) else (first, second)


def share(sums: Floats) -> Floats:
    """Return `s0 / s1`: a rate or a mean."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 0] / np.where(sums[..., 1] > 0.0, sums[..., 1], np.nan))


def gap(sums: Floats) -> Floats:
    """Return `s0 / s1 - s2 / s3`: the difference of two rates of different units."""
    return share(sums[..., :2]) - share(sums[..., 2:])


def item_rows(records: Sequence[Record], contribution: Callable[[Record], tuple[float, ...] | None]) -> dict[str, Row]:
    """Return one row per item; with several samples of an item, the mean of their contributions.

    Args:
        records: One model's records.
        contribution: Columns of one record; None leaves it out.
    """
    found: dict[str, Row] = {}
    several: dict[str, list[tuple[float, ...]]] = {}
    for record in records:
        columns = contribution(record)
        if columns is None:
            continue
        item = record.item_id
        if item not in found:
            found[item] = Row(columns, record.cluster_id or item)
        else:
            several.setdefault(item, [found[item].columns]).append(columns)
    for item, samples in several.items():
        found[item] = found[item]._replace(columns=_mean(samples))
    return found


def _mean(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
