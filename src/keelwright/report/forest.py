# SPDX-License-Identifier: Apache-2.0
"""Draws forest plots: one row per hazard area, a mark with its interval per model or per change, in any number of rows.

The interval is the line, the value and its count stand at the right; a change that is no finding is hollow, so that
colour is never the only sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from keelwright.core.records import Estimate
from keelwright.report.axes import Scale, nice_ticks, text_width
from keelwright.report.svg import element, group, label, line, marker, picture
from keelwright.report.text import MINUS, NOT_MEASURED, Unit, clip, number

_LANE = 14.0
_PAD = 8.0
_HEAD = 26.0
_FOOT = 30.0
_NAME_LINE = 17.0
_LETTER = 6.9
"""Mean width of a letter of a row's name, in user units."""
_FOOT_FROM = 12
"""From so many rows on the axis stands below them too."""


@dataclass(frozen=True, slots=True)
class ForestPoint:
    """One mark in a row."""

    class_: str
    """`role-model` and the like, or `good`, `bad` and `quiet` for changes."""
    shape: str
    """Of `svg.SHAPES`; hollow where it is no finding."""
    is_hollow: bool
    estimate: Estimate | None
    value: str
    """What stands at the right of the row."""
    tip: str


@dataclass(frozen=True, slots=True)
class ForestRow:
    """One hazard area."""

    name: str
    points: tuple[ForestPoint, ...]


@dataclass(frozen=True, slots=True)
class ForestAxis:
    """What the horizontal axis shows."""

    unit: Unit
    title: str
    """Which way is which."""
    zero: float | None = None
    """Where a line without a change stands."""


def draw_forest(
    rows: Sequence[ForestRow], axis: ForestAxis, *, name: str, title: str, description: str, width: float
) -> Markup:
    """Return the plot as one `svg` element; narrow drawings have each name above its row.

    Args:
        rows: In the order in which they are drawn; at least one.
        axis: What the horizontal axis shows.
        name: Id of the element, unique on the page.
        title: Accessible name.
        description: For readers who cannot see it.
        width: In user units.
    """
    is_wide = width > 500
    value_width = max(text_width(point.value, 10.5) for row in rows for point in row.points) + 8
    names = min(0.36 * width, max(text_width(row.name, 11.5) for row in rows) + 10) if is_wide else 0.0
    ticks = _ticks(rows, axis, 6 if is_wide else 4)
    # A narrow row with one mark has its value beside its name, so that the plot keeps the width.
    has_values_above = not is_wide and max(len(row.points) for row in rows) == 1
    right = width - 16 if has_values_above else width - value_width - 6
    scale = Scale(ticks[0], ticks[-1], names + 6 if is_wide else 16.0, right)
    body, top = [_axis(scale, ticks, axis.unit, _HEAD - 9)], _HEAD
    marks = []
    for place, row in enumerate(rows):
        height = _PAD + _LANE * len(row.points) + (0.0 if is_wide else _NAME_LINE)
        if place % 2 == 0:
            body.append(element("rect", x=0.0, y=top, width=width, height=height, class_="band"))
        room = names or (width - value_width if has_values_above else width)
        marks.append(_row(row, scale, top, room, width, is_wide=is_wide, has_values_above=has_values_above))
        top += height
    body += [line(scale(tick), _HEAD, scale(tick), top, "grid") for tick in ticks]
    if axis.zero is not None:
        body.append(line(scale(axis.zero), _HEAD - 4, scale(axis.zero), top + 4, "zero"))
    if len(rows) >= _FOOT_FROM:
        body.append(_axis(scale, ticks, axis.unit, top + 15))
    below = top + (_FOOT if len(rows) >= _FOOT_FROM else 17)
    body.append(label(max(scale.stop, text_width(axis.title, 12.5)), below, axis.title, "axis-title", "end"))
    height = top + _FOOT + 8
    return picture(name, title, description, width, height, [*body, *marks])


def _ticks(rows: Sequence[ForestRow], axis: ForestAxis, count: int) -> list[float]:
    found = [point.estimate for row in rows for point in row.points if point.estimate is not None]
    ends = [end for one in found for end in (one.low, one.high)] or [0.0, 1.0]
    if axis.zero is not None:
        ends.append(axis.zero)
    elif axis.unit == "rate" and min(ends) >= 0.0 and max(ends) <= 1.0:
        return [0.0, 0.25, 0.5, 0.75, 1.0]
    ticks = nice_ticks(min(ends), max(ends), count)
    if axis.unit == "points" and min(ends) >= -1.0 and max(ends) <= 1.0:
        return [tick for tick in ticks if -1.0 <= tick <= 1.0]
    return ticks


def _axis(scale: Scale, ticks: Sequence[float], unit: Unit, y: float) -> Markup:
    return group([label(scale(tick), y, _tick(tick, unit), "tick", "middle") for tick in ticks])


def _tick(value: float, unit: Unit) -> str:
    if unit == "number":
        return f"{value:g}".replace("-", MINUS)
    sign = "+" if unit == "points" and value > 0 else ""
    return f"{sign}{100 * value:g}{'%' if unit == 'rate' else ''}".replace("-", MINUS)


def _row(
    row: ForestRow, scale: Scale, top: float, room: float, width: float, *, is_wide: bool, has_values_above: bool
) -> Markup:
    shown, cut = clip(row.name, max(8, int((room - 10) / _LETTER)))
    lanes = top + _PAD / 2 + (0.0 if is_wide else _NAME_LINE)
    middle = top + _PAD / 2 + _LANE * len(row.points) / 2 + 4
    name = label(0.0 if not is_wide else 4.0, middle if is_wide else top + 15, shown, "row-name")
    parts = [group([element("title", row.name), name]) if cut else name]
    for place, point in enumerate(row.points):
        y = lanes + _LANE * (place + 0.5)
        parts.append(label(width - 2, top + 15 if has_values_above else y + 4, point.value, "row-value", "end"))
        if point.estimate is not None:
            class_ = f"point {point.class_}{' hollow' if point.is_hollow else ''}"
            parts.append(group([element("title", point.tip), *_mark(point, point.estimate, scale, y)], class_=class_))
    return group(parts)


def _mark(point: ForestPoint, estimate: Estimate, scale: Scale, y: float) -> list[Markup]:
    low, high = scale(estimate.low), scale(estimate.high)
    return [
        # The whole row answers to the pointer, so that a short interval has its tooltip too.
        element("rect", x=scale.start, y=y - _LANE / 2, width=scale.stop - scale.start, height=_LANE, class_="hit"),
        line(low, y, high, y, "span"),
        line(low, y - 3.5, low, y + 3.5, "span"),
        line(high, y - 3.5, high, y + 3.5, "span"),
        marker(point.shape, scale(estimate.value), y, 4.2, "mark"),
    ]


def not_measured(class_: str, shape: str) -> ForestPoint:
    """Return the empty lane of a model that was not measured here."""
    return ForestPoint(class_, shape, True, None, NOT_MEASURED, "")


def counted(value: str, n: int) -> str:
    """Return what stands at the right of a row: a value and its count."""
    return f"{value}, n = {n:,}"


def q_words(q_value: float | None) -> str:
    """Return a false discovery rate in short."""
    if q_value is None:
        return ""
    return "q < 0.001" if q_value < 0.001 else f"q = {number(min(q_value, 1.0), 2)}"
