# SPDX-License-Identifier: Apache-2.0
"""Draws values over steps: a line per series with a band around it, several charts on one picture.

Each series has its own mark and dashes, so that colour is never the only sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from keelwright.report.axes import Box, Scale, nice_ticks, text_width
from keelwright.report.svg import element, group, label, line, marker, picture
from keelwright.report.text import MINUS, Unit, clip

_HEAD = 30.0
_FOOT = 22.0
_X_TITLE = 20.0
_LEFT = 46.0
_RIGHT = 12.0
_MARK = 4.4
_TICK_ROOM = 34.0
"""Least distance of two ticks of the horizontal axis, in user units."""
_MANY_SPOTS = 24
"""From so many values on a line has no marks: it is a course, and no value is one of a few measurements."""


@dataclass(frozen=True, slots=True)
class Spot:
    """One value of a series with the ends of its band; equal ends are no band."""

    x: float
    value: float
    low: float
    high: float
    tip: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """One line."""

    name: str
    class_: str
    """`role-arm-1` and the like: its colour."""
    shape: str
    """Of `svg.SHAPES`."""
    spots: tuple[Spot, ...]
    """In rising order of `x`, at least one."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One pair of axes."""

    title: str
    series: tuple[Series, ...]
    unit: Unit = "rate"
    x_title: str = ""
    """Shown below the axis where it is not empty."""


def draw_charts(
    charts: Sequence[tuple[Chart, Box]], *, name: str, title: str, description: str, width: float
) -> Markup:
    """Return charts on one picture.

    Args:
        charts: Each with the place that it fills, title and ticks included.
        name: Id of the element, unique on the page.
        title: Accessible name.
        description: For readers who cannot see it.
        width: Of the picture, in user units.
    """
    body = [part for chart, place in charts for part in _chart(chart, place)]
    return picture(name, title, description, width, max(place.bottom for _, place in charts), body)


def board(count: int, width: float) -> list[Box]:
    """Return places for a main chart and those beside it; on a narrow picture all stand in one column."""
    if width <= 500:
        heights, gap = [250.0] + [150.0] * (count - 1), 14.0
        tops = [sum(heights[:place]) + place * gap for place in range(count)]
        return [Box(0.0, top, width, top + height) for top, height in zip(tops, heights, strict=True)]
    if count == 1:
        return [Box(0.0, 0.0, width, 300.0)]
    edge, height, gap = 0.6 * width, 350.0, 12.0
    share = (height + gap) / (count - 1)
    beside = [Box(edge + 16, place * share, width, (place + 1) * share - gap) for place in range(count - 1)]
    return [Box(0.0, 0.0, edge, height), *beside]


def grid(count: int, width: float, *, most_columns: int = 3, height: float = 168.0) -> list[Box]:
    """Return places of equal size in rows; on a narrow picture all stand in one column."""
    columns = 1 if width <= 500 else min(most_columns, max(2, count))
    gap = 16.0
    cell = (width - (columns - 1) * gap) / columns
    return [
        Box(left, top, left + cell, top + height - gap)
        for left, top in (((place % columns) * (cell + gap), (place // columns) * height) for place in range(count))
    ]


def _chart(chart: Chart, place: Box) -> list[Markup]:
    spots = [spot for series in chart.series for spot in series.spots]
    y_ticks = _y_ticks(spots, chart.unit, is_small=place.bottom - place.top < 200)
    foot = _FOOT + (_X_TITLE if chart.x_title else 0.0)
    plot = Box(place.left + _LEFT, place.top + _HEAD, place.right - _RIGHT, place.bottom - foot)
    last = max(spot.x for spot in spots)
    x = Scale(0.0, last or 1.0, plot.left + 8, plot.right)
    y = Scale(y_ticks[0], y_ticks[-1], plot.bottom, plot.top)
    body = [label(place.left + 2, place.top + 13, _fitted(chart.title, place), "axis-title")]
    for tick in y_ticks:
        body.append(line(plot.left, y(tick), plot.right, y(tick), "grid"))
        body.append(label(plot.left - 7, y(tick) + 4, _tick(tick, chart.unit), "tick", "end"))
    body.append(line(plot.left, plot.bottom, plot.right, plot.bottom, "axis"))
    for tick in _x_ticks(chart, x):
        body.append(line(x(tick), plot.bottom, x(tick), plot.bottom + 4, "axis"))
        body.append(label(x(tick), plot.bottom + 17, f"{tick:,g}", "tick", "middle"))
    if chart.x_title:
        body.append(label(plot.right, plot.bottom + 36, chart.x_title, "x-title", "end"))
    body += [_band(series, x, y) for series in chart.series]
    body += [_line(series, x, y) for series in chart.series]
    return body


def _fitted(title: str, place: Box) -> str:
    room = place.right - place.left
    return clip(title, max(8, int(room / text_width("x", 12.5))))[0]


def _y_ticks(spots: Sequence[Spot], unit: Unit, *, is_small: bool) -> list[float]:
    low, high = min(spot.low for spot in spots), max(spot.high for spot in spots)
    if unit == "rate" and low >= 0.0 and high <= 1.0:
        return [0.0, 0.5, 1.0] if is_small else [0.0, 0.25, 0.5, 0.75, 1.0]
    return nice_ticks(low, high, 2 if is_small else 5)


def _x_ticks(chart: Chart, x: Scale) -> list[float]:
    """Return the steps at which the first line was measured, without those that would touch; of a course round ones."""
    found = sorted({spot.x for spot in chart.series[0].spots} | {x.high})
    if len(found) > _MANY_SPOTS:
        room = max(1, int((x.stop - x.start) / (2 * _TICK_ROOM)))
        return [tick for tick in nice_ticks(0.0, found[-1], room) if tick <= found[-1]]
    kept: list[float] = []
    # From the last backwards: the step at which training ended is always named.
    for tick in reversed(found):
        if not kept or x(kept[-1]) - x(tick) >= _TICK_ROOM:
            kept.append(tick)
    return kept[::-1]


def _tick(value: float, unit: Unit) -> str:
    text = f"{100 * value:g}%" if unit == "rate" else f"{value:g}"
    return text.replace("-", MINUS)


def _band(series: Series, x: Scale, y: Scale) -> Markup:
    if len(series.spots) < 2 or all(spot.low == spot.high for spot in series.spots):
        return Markup("")
    upper = [f"{x(spot.x):.1f},{y(spot.high):.1f}" for spot in series.spots]
    lower = [f"{x(spot.x):.1f},{y(spot.low):.1f}" for spot in reversed(series.spots)]
    return element("polygon", points=" ".join(upper + lower), class_=f"series-band {series.class_}")


def _line(series: Series, x: Scale, y: Scale) -> Markup:
    at = [(x(spot.x), y(spot.value)) for spot in series.spots]
    parts = []
    if len(at) > 1:
        path = "M" + "L".join(f"{one:.1f} {two:.1f}" for one, two in at)
        parts.append(element("path", d=path, class_="series-line"))
    if len(at) <= _MANY_SPOTS:
        for spot, (left, top) in zip(series.spots, at, strict=True):
            mark = marker(series.shape, left, top, _MARK, "series-mark")
            whisker = [line(left, y(spot.low), left, y(spot.high), "series-span")] if len(at) == 1 else []
            parts.append(group([element("title", spot.tip or series.name), *whisker, mark]))
    return group(parts, class_=f"series {series.class_}")


def key_of(series: Series) -> Markup:
    """Return the line and mark of a series as a legend shows them."""
    drawn = [element("path", d="M1 9H29", class_="series-line"), marker(series.shape, 15, 9, _MARK, "series-mark")]
    inner = group(drawn, class_=f"series {series.class_}")
    return element("svg", inner, viewBox="0 0 30 18", width=30, height=18, aria_hidden="true", class_="key")
