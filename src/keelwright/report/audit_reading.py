# SPDX-License-Identifier: Apache-2.0
"""Reads the summary of an audit or a comparison: what decides, in which unit, and the key figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keelwright.core.records import Estimate
from keelwright.report.bars import draw_strip
from keelwright.report.parts import figures_by_role
from keelwright.report.reading import read_estimate, read_metrics, unit_of_utility
from keelwright.report.sections import KeyFigure, key_figures
from keelwright.report.tables import utility_words
from keelwright.report.text import METRICS, Unit, interval, metric_title, quantity, unit_of

_MOST_KEYS = 4


def primary_of(summary: Mapping[str, Any]) -> str:
    """Return the metric that decides; runs that do not name it are read by what was measured."""
    if summary.get("primary"):
        return str(summary["primary"])
    rows = [*(summary.get("changes") or ()), *(summary.get("tests") or ())]
    if rows and "metrics" not in summary:
        return str(rows[0]["metric"])
    knows_harm = (read_metrics(summary.get("metrics")) or {}).get("harm_rate") is not None
    return "harm_rate" if knows_harm else "refusal_rate"


def unit_of_metric(summary: Mapping[str, Any], metric: str) -> Unit:
    """Return how a metric of the summary is printed."""
    if metric in METRICS:
        return unit_of_utility(summary) if metric == "utility" else "rate"
    found = _row_of(summary, metric)
    return "rate" if found is None else unit_of(found.get("unit", "rate"))


def is_lower_better(summary: Mapping[str, Any], metric: str) -> bool:
    """Return which end of a metric is the better one."""
    if metric in METRICS:
        return METRICS[metric].lower_is_better
    found = _row_of(summary, metric)
    return found is not None and not found.get("higher_is_better", True)


def _row_of(summary: Mapping[str, Any], metric: str) -> Mapping[str, Any] | None:
    rows = [*(summary.get("figures") or ()), *(summary.get("changes") or ())]
    return next((one for one in rows if one["metric"] == metric), None)


def audit_key_figures(
    summary: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Estimate | None] | None],
    roles: Sequence[tuple[str, str]],
    primary: str,
) -> list[KeyFigure]:
    """Return the figures that stand first: the headline rates, or the suite's own where it has none of those.

    Args:
        summary: Of an audit.
        models: The headline metrics by role.
        roles: Pairs of role and title, the audited model last.
        primary: The metric that decides.
    """
    decides = primary if primary in METRICS else "refusal_rate"
    found = key_figures(
        models,
        roles,
        primary=decides,
        utility_unit=unit_of_utility(summary),
        utility_counts=utility_words(summary),
    )
    own = {} if primary in METRICS and found else figures_by_role(summary)
    further = [_key_figure(own, roles, place) for place in range(len(own.get("model", ())))]
    return [*(one for one in further if one is not None), *found][:_MOST_KEYS]


def _key_figure(
    figures: Mapping[str, Sequence[Mapping[str, Any]]], roles: Sequence[tuple[str, str]], place: int
) -> KeyFigure | None:
    one = figures["model"][place]
    unit = unit_of(one.get("unit"))
    by_role = {
        role: next((row for row in rows if (row["metric"], row["part"]) == (one["metric"], one["part"])), {})
        for role, rows in figures.items()
    }
    found = [(role, title, read_estimate(by_role.get(role, {}).get("estimate"))) for role, title in roles]
    measured = [(role, title, estimate) for role, title, estimate in found if estimate is not None]
    if not measured or unit == "points" or measured[-1][0] != roles[-1][0]:
        return None
    role, title, estimate = measured[-1]
    name = str(one.get("title") or metric_title(str(one["metric"])))
    return KeyFigure(
        title=name,
        counts=str(one.get("counts") or ""),
        role=role,
        role_title=title,
        value=quantity(estimate.value, unit),
        range=f"{interval(estimate.low, estimate.high, unit)}, n = {estimate.n:,}",
        others=tuple((other, said, quantity(value.value, unit)) for other, said, value in measured[:-1]),
        note="",
        strip=draw_strip(
            measured,
            name=f"strip-figure-{place}",
            title=f"{name} on a line from zero up",
            high=max(1.0, *(value.high for _, _, value in measured)),
        ),
    )
