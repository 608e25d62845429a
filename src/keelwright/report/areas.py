# SPDX-License-Identifier: Apache-2.0
"""The primary metric by hazard area: both models side by side, and the paired change, each as figure and table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from markupsafe import Markup

from keelwright.core.records import Estimate
from keelwright.report.figures import NARROW, WIDE, Figure, LegendEntry, Panel
from keelwright.report.forest import ForestAxis, ForestPoint, ForestRow, counted, draw_forest, not_measured, q_words
from keelwright.report.reading import read_estimate
from keelwright.report.svg import element, group, marker
from keelwright.report.tables import Cell, Column, Table, Tone, areas_table, pairs_words, unseen_words
from keelwright.report.text import (
    NOT_MEASURED,
    Unit,
    change,
    change_interval,
    interval,
    metric_title,
    p_value,
    quantity,
    unit_of,
    words,
)

_LEVEL: Final = 0.05
_SHAPES: Final = ("circle", "diamond")


def area_forest(
    areas: Sequence[Mapping[str, Any]],
    roles: Sequence[tuple[str, str]],
    metric: str,
    *,
    unit: Unit = "rate",
    lower_is_better: bool = True,
) -> Figure | None:
    """Return the metric of every area and model with its interval and count, the worst area first.

    Args:
        areas: `{"area": ..., role: E, ...}` as in `summary.json`.
        roles: Pairs of key and title; the last one's values give the order.
        metric: What the values are.
        unit: How they are printed.
        lower_is_better: Which end is the worst.
    """
    if not areas:
        return None
    ranked = _worst_first(areas, [role for role, _ in reversed(roles)], lower_is_better=lower_is_better)
    rows = [
        ForestRow(
            words(str(area["area"])),
            tuple(
                _point(read_estimate(area.get(role)), role, title, _SHAPES[place % 2], area, unit)
                for place, (role, title) in enumerate(roles)
            ),
        )
        for area in ranked
    ]
    title = f"{metric_title(metric)} by hazard area"
    axis = ForestAxis(unit, f"{metric_title(metric)}, {'lower' if lower_is_better else 'higher'} is better")
    worst = f"{rows[0].name} {rows[0].points[-1].value}"
    description = f"{len(rows)} areas, sorted, the worst first: {worst}. The table below the figure holds every value."
    panel = _panel(rows, axis, "areas", title, description)
    legend = [
        LegendEntry(_key(marker(_SHAPES[place % 2], 9, 9, 5, "mark"), f"point role-{role}"), name)
        for place, (role, name) in enumerate(roles)
    ]
    return Figure("areas", (panel,), tuple(legend), areas_table(ranked, roles, metric, unit))


def _worst_first(
    areas: Sequence[Mapping[str, Any]], roles: Sequence[str], *, lower_is_better: bool
) -> list[Mapping[str, Any]]:
    """Order areas by the first of `roles`; ties by how much better the second is: what was lost stands first."""

    def badness(area: Mapping[str, Any]) -> tuple[bool, tuple[float, ...], str]:
        found = [read_estimate(area.get(role)) for role in roles]
        values = [0.0 if one is None else (-one.value if lower_is_better else one.value) for one in found]
        return found[0] is None, (values[0], *(-value for value in values[1:])), str(area["area"])

    return sorted(areas, key=badness)


def _point(
    found: Estimate | None, role: str, title: str, shape: str, area: Mapping[str, Any], unit: Unit
) -> ForestPoint:
    if found is None:
        return not_measured(f"role-{role}", shape)
    value = quantity(found.value, unit)
    ends = interval(found.low, found.high, unit)
    tip = f"{words(str(area['area']))}, {title.lower()}: {value} ({ends}, n = {found.n:,})"
    return ForestPoint(f"role-{role}", shape, False, found, counted(value, found.n), tip)


def change_forest(rows: Sequence[Mapping[str, Any]], metric: str) -> Figure | None:
    """Return the paired change of every area with its interval and false discovery rate, the worst first.

    Args:
        rows: `area_changes` of a summary: mappings of changes with `area` and `q_value`.
        metric: What changed.
    """
    if not rows:
        return None
    sign = -1.0 if rows[0].get("higher_is_better") else 1.0
    ranked = sorted(rows, key=lambda row: (-sign * float(row["difference"]), row["q_value"], str(row["area"])))
    unit: Unit = "number" if unit_of(rows[0].get("unit", "rate")) == "number" else "points"
    drawn = [ForestRow(words(str(row["area"])), (_change_point(row, unit),)) for row in ranked]
    better = "right" if rows[0].get("higher_is_better") else "left"
    title = f"Paired change of the {metric_title(metric).lower()} by hazard area"
    axis = ForestAxis(unit, f"Change{'' if unit == 'number' else ' in points'}, {better} is better", zero=0.0)
    findings = sum(_is_found(row) for row in rows)
    description = (
        f"{len(rows)} areas, {findings} with a change at a false discovery rate of 0.05. The one that changed most for "
        f"the worse: {drawn[0].name} {drawn[0].points[0].value}. The table below the figure holds every value."
    )
    legend = [
        LegendEntry(_key(marker("circle", 9, 9, 5, "mark"), f"point {tone}{extra}"), text)
        for tone, extra, text in (
            ("bad", "", "worse, q below 0.05"),
            ("good", "", "better, q below 0.05"),
            ("quiet", " hollow", "no evidence of change"),
        )
    ]
    table = area_changes_table(ranked, metric)
    return Figure("area-changes", (_panel(drawn, axis, "area-changes", title, description),), tuple(legend), table)


def _is_found(row: Mapping[str, Any]) -> bool:
    return float(row["q_value"]) < _LEVEL


def _tone(row: Mapping[str, Any]) -> Tone:
    if not _is_found(row):
        return ""
    return "good" if (float(row["difference"]) > 0.0) == bool(row.get("higher_is_better")) else "bad"


def _change_point(row: Mapping[str, Any], unit: Unit) -> ForestPoint:
    found = Estimate(float(row["difference"]), float(row["low"]), float(row["high"]), int(row["n"]))
    value = change(found.value, unit).removesuffix(" points")
    tip = (
        f"{words(str(row['area']))}: {change(found.value, unit)} ({change_interval(found.low, found.high, unit)}), "
        f"n = {found.n:,}, {q_words(row['q_value'])}"
    )
    shown = f"{value}, {q_words(row['q_value'])}, n = {found.n:,}"
    return ForestPoint(_tone(row) or "quiet", "circle", not _is_found(row), found, shown, tip)


def area_changes_table(rows: Sequence[Mapping[str, Any]], metric: str) -> Table:
    """Return the paired change of every area with p, q, and what could have been seen where nothing was found."""
    columns = (
        Column("Area"),
        Column("Difference", True),
        Column("95% interval", True),
        Column("p", True),
        Column("q", True, note="false discovery rate"),
        Column("n", True),
        Column("Test"),
    )
    body = []
    for row in rows:
        unit: Unit = "number" if unit_of(row.get("unit", "rate")) == "number" else "points"
        tone = _tone(row)
        verdict = {"good": "improved", "bad": "regressed"}.get(tone, "no evidence of change")
        is_quiet = not tone or float(row.get("p_value") or 0.0) >= _LEVEL
        low, high = row.get("low"), row.get("high")
        body.append(
            (
                Cell(words(str(row["area"]))),
                Cell(change(float(row["difference"]), unit), verdict, tone),
                Cell(NOT_MEASURED if low is None or high is None else change_interval(low, high, unit)),
                Cell(p_value(row.get("p_value"))),
                Cell(p_value(row.get("q_value"))),
                Cell(f"{row.get('n', 0):,}", pairs_words(row)),
                Cell(
                    str(row.get("test") or ""),
                    unseen_words(row.get("minimum_detectable_change"), unit) if is_quiet else "",
                ),
            )
        )
    caption = f"Paired change of the {metric_title(metric).lower()} by hazard area, adjusted together"
    return Table("area-change-values", caption, columns, tuple(body))


def _panel(rows: Sequence[ForestRow], axis: ForestAxis, name: str, title: str, description: str) -> Panel:
    wide, narrow = (
        draw_forest(rows, axis, name=f"{name}-{size}", title=title, description=description, width=width)
        for size, width in (("wide", WIDE), ("narrow", NARROW))
    )
    return Panel("", wide, narrow)


def _key(mark: Markup, class_: str) -> Markup:
    drawn = group([mark], class_=class_)
    return element("svg", drawn, viewBox="0 0 18 18", width=18, height=18, aria_hidden="true", class_="key")
