# SPDX-License-Identifier: Apache-2.0
"""Figures of a training run: what was measured over its steps and over doses, and its losses.

Harm never stands alone: the ordinary answers and the incoherent share are drawn beside it, at the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from keelwright.core.records import Estimate
from keelwright.report.figures import NARROW, WIDE, Figure, LegendEntry, Panel
from keelwright.report.line_chart import Chart, Series, Spot, board, draw_charts, grid, key_of
from keelwright.report.reading import read_estimate
from keelwright.report.svg import SHAPES
from keelwright.report.tables import Cell, Column, Table
from keelwright.report.text import METRICS, NOT_MEASURED, interval, metric_title, number, quantity
from keelwright.report.training_log import Course, courses_of
from keelwright.report.tuning_reading import TuningReading, lines_of
from keelwright.report.tuning_tables import harm_title, knee_point, knee_table, knee_words

_BESIDE: Final = ("answer_rate", "incoherent")
_FURTHER: Final = ("over_refusal", "utility")
_MOST_SPOTS: Final = 240
"""Steps of a training curve that are drawn; of more, neighbours are averaged."""
_MOST_LISTED: Final = 12


def step_curves(reading: TuningReading) -> list[tuple[str, Figure]]:
    """Return the primary metric over steps with what must be read beside it: a title and a figure for each stress."""
    if not reading.rows or not reading.is_measured(reading.primary):
        return []
    if len(reading.stresses) < 2:
        return [("", _step_curve(reading, None, "steps"))]
    return [
        (stress, _step_curve(reading, stress, f"steps-{place}")) for place, stress in enumerate(reading.stresses, 1)
    ]


def _step_curve(reading: TuningReading, stress: str | None, name: str) -> Figure:
    axis = "Tuning steps" if reading.is_tuned else "Steps of the hardening"
    beside = [one for one in _BESIDE if reading.is_measured(one)]
    further = [one for one in _FURTHER if reading.is_measured(one)]
    charts = [_chart(reading, reading.primary, stress, axis), *(_chart(reading, one, stress) for one in beside)]
    told = f" with {stress}" if stress else ""
    title = f"{metric_title(reading.primary)} over {axis.lower()}{told}"
    names = [metric_title(one).lower() for one in beside]
    more = f" {' and '.join(names).capitalize()} stand beside it, at the same steps." if names else ""
    panels = [_panel(name, title, _ends(charts[0]) + more, charts, board)]
    if further:
        others = [_chart(reading, one, stress, axis) for one in further]
        title = f"{' and '.join(metric_title(one) for one in further)} over {axis.lower()}{told}"
        panels.append(_panel(f"{name}-more", title, " ".join(_ends(one) for one in others), others, _pair))
    legend = tuple(LegendEntry(key_of(one), one.name) for one in charts[0].series)
    metrics = (reading.primary, *beside, *further)
    return Figure(name, tuple(panels), legend, _steps_table(reading, stress, f"{name}-values", metrics))


def dose_curve(reading: TuningReading) -> Figure | None:
    """Return harm, over-refusal and accuracy over the doses of a sweep with the knee marked, or None without one."""
    knee = knee_point(reading)
    if knee is None:
        return None
    names = {"harm": harm_title(reading), "over_refusal": "Over-refusal", "accuracy": "Accuracy"}
    charts = []
    for name, title in names.items():
        rates = {int(one["k"]): read_estimate(one.get(name)) for one in reading.summary["knee"]["points"]}
        spots = tuple(_dose_spot(k, one, title) for k, one in rates.items() if one is not None)
        chosen = tuple(spot for spot in spots if spot.x == knee["k"])
        lines = [Series("Each dose", "role-arm-2", SHAPES[0], spots)]
        lines += [Series(f"The knee, k = {knee['k']:,}", "role-arm-1", SHAPES[1], chosen)] if chosen else []
        better = "higher" if name == "accuracy" else "lower"
        if spots:
            charts.append(Chart(f"{title}, {better} is better", tuple(lines), x_title="k"))
    panel = _panel(
        "doses", f"{names['harm']} and its price over k", f"The knee is {knee_words(reading)}.", charts, grid
    )
    legend = tuple(LegendEntry(key_of(one), one.name) for one in charts[0].series)
    return Figure("doses", (panel,), legend, knee_table(reading))


def _dose_spot(k: int, one: Estimate, title: str) -> Spot:
    tip = f"k = {k:,}\n{title} {quantity(one.value, 'rate')} ({interval(one.low, one.high)}, n = {one.n:,})"
    return Spot(float(k), one.value, one.low, one.high, tip)


def training_curve(reading: TuningReading) -> Figure | None:
    """Return the losses and further figures of the training logs over their steps, or None without a log."""
    courses = courses_of(reading)
    groups: dict[str, list[Series]] = {}
    for course in courses:
        spots = _thinned(course.values)
        if spots:
            groups.setdefault(course.title, []).append(Series(course.arm, course.class_, course.shape, spots))
    if not groups:
        return None
    charts = [Chart(title, tuple(lines), "number") for title, lines in groups.items()]
    description = " ".join(f"{chart.title}: {', '.join(_from_to(one) for one in chart.series)}." for chart in charts)
    panel = _panel("training", "What training recorded, step by step", description, charts, grid)
    legend = {series.name: LegendEntry(key_of(series), series.name) for chart in charts for series in chart.series}
    shown = tuple(legend.values()) if set(legend) != {""} else ()
    return Figure("training", (panel,), shown, _course_table(courses))


def _from_to(series: Series) -> str:
    ends = f"from {number(series.spots[0].value)} to {number(series.spots[-1].value)}"
    return f"{series.name} {ends}" if series.name else ends


def _pair(count: int, width: float) -> list[Any]:
    return grid(count, width, most_columns=2, height=190.0)


def _panel(name: str, title: str, description: str, charts: Sequence[Chart], places: Any) -> Panel:
    drawn = [
        draw_charts(
            list(zip(charts, places(len(charts), width), strict=True)),
            name=f"{name}-{kind}", title=title, description=description, width=width,
        )
        for kind, width in (("wide", WIDE), ("narrow", NARROW))
    ]  # fmt: skip
    return Panel("", drawn[0], drawn[1])


def _chart(reading: TuningReading, metric: str, stress: str | None, axis: str = "") -> Chart:
    better = "lower" if METRICS[metric].lower_is_better else "higher"
    title = f"{metric_title(metric)}, {better} is better"
    return Chart(title, lines_of(reading, metric, stress), reading.unit(metric), axis)


def _ends(chart: Chart) -> str:
    """Return where each line ends, in words."""
    parts = [f"{one.name} {quantity(one.spots[-1].value, chart.unit)}" for one in chart.series]
    return f"{chart.title.partition(',')[0]} at the end: {', '.join(parts)}."


def _steps_table(reading: TuningReading, stress: str | None, name: str, metrics: Sequence[str]) -> Table:
    """Return the values that the lines go through: every one of them, with its band."""
    lines = {metric: {one.name: one for one in lines_of(reading, metric, stress)} for metric in metrics}
    rows = [
        (
            Cell(arm, f"step {spot.x:,g}"),
            *(_spot_cell(lines[metric].get(arm), spot.x, reading, metric) for metric in metrics),
        )
        for arm, series in lines[reading.primary].items()
        for spot in series.spots
    ]
    columns = (Column("Arm"), *(Column(metric_title(metric), True) for metric in metrics))
    caption = "Values behind the lines; several seeds are averaged, with their range where they differ"
    return Table(name, caption, columns, tuple(rows))


def _spot_cell(series: Series | None, x: float, reading: TuningReading, metric: str) -> Cell:
    spot = next((one for one in series.spots if one.x == x), None) if series else None
    if spot is None:
        return Cell(NOT_MEASURED, tone="muted")
    unit = reading.unit(metric)
    ends = f"{quantity(spot.low, unit)} to {quantity(spot.high, unit)}" if spot.low < spot.high else ""
    return Cell(quantity(spot.value, unit), ends)


def _thinned(values: Sequence[Any]) -> tuple[Spot, ...]:
    """Return a course's values by step, neighbours averaged where there are many; without steps that have no number."""
    found = [(float(step + 1), float(one)) for step, one in enumerate(values) if _is_number(one)]
    size = max(1, math.ceil(len(found) / _MOST_SPOTS))
    spots = []
    for first in range(0, len(found), size):
        block = found[first : first + size]
        value = sum(one for _, one in block) / len(block)
        spots.append(Spot(block[-1][0], value, value, value))
    return tuple(spots)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _course_table(courses: Sequence[Course]) -> Table:
    """Return some steps of every course: one row per step, as many columns as there are courses."""
    filled = [one for one in courses if _thinned(one.values)]
    last = max(len(one.values) for one in filled)
    stride = max(1, math.ceil(last / _MOST_LISTED))
    steps = sorted({*range(0, last, stride), last - 1})
    rows = tuple((Cell(f"{step + 1:,}"), *(_course_cell(one.values, step) for one in filled)) for step in steps)
    columns = (Column("Step"), *(Column(one.title, True, note=one.arm) for one in filled))
    return Table("training-values", "The training logs, at some of their steps", columns, rows)


def _course_cell(values: Sequence[Any], step: int) -> Cell:
    if step >= len(values):
        return Cell("")
    return Cell(number(float(values[step]))) if _is_number(values[step]) else Cell(NOT_MEASURED, tone="muted")
