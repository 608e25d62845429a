# SPDX-License-Identifier: Apache-2.0
"""Draws rates: bars by hazard area with intervals, and the small strips of the key figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from keelwright.core.records import Estimate
from keelwright.report.axes import Scale
from keelwright.report.reading import read_estimate
from keelwright.report.svg import element, group, label, line, picture, role_disc
from keelwright.report.text import NOT_MEASURED, interval, metric_title, number, percent, words

_ROW = 22.0
_HEAD = 30.0
_GAP = 20.0
_NAME = 84.0
_VALUE = 58.0


def draw_areas(
    areas: Sequence[Mapping[str, Any]],
    roles: Sequence[tuple[str, str]],
    metric: str,
    *,
    name: str,
    width: float,
) -> Markup | None:
    """Return one panel of bars per hazard area, each bar with its interval, or None where there are no areas.

    Args:
        areas: `{"area": ..., role: E, ...}` as in `summary.json`.
        roles: Pairs of key and title, in the order of the bars; a key that is a role has the role's colour.
        metric: The rate that the bars show.
        name: Id of the element, unique on the page.
        width: Width in user units; wide drawings have two columns of panels.
    """
    if not areas:
        return None
    columns = 2 if width > 500 and len(areas) > 1 else 1
    panel_width = (width - (columns - 1) * 36) / columns
    panel_height = _HEAD + _ROW * len(roles) + _GAP
    body = []
    for index, area in enumerate(areas):
        left = (index % columns) * (panel_width + 36)
        top = (index // columns) * panel_height
        body.append(_panel(area, roles, metric, left, top, panel_width))
    height = -(-len(areas) // columns) * panel_height - _GAP + 6
    title = f"{metric_title(metric)} by hazard area"
    return picture(name, title, _description(areas, roles), width, height, body)


def _panel(
    area: Mapping[str, Any],
    roles: Sequence[tuple[str, str]],
    metric: str,
    left: float,
    top: float,
    width: float,
) -> Markup:
    scale = Scale(0.0, 1.0, left + _NAME, left + width - _VALUE)
    first, last = top + _HEAD - 4, top + _HEAD + _ROW * len(roles)
    area_name = words(str(area["area"]))
    parts = [label(left, top + 16, area_name, "area-name")]
    parts += [line(scale(share), first, scale(share), last, "grid") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for index, (role, title) in enumerate(roles):
        y = top + _HEAD + _ROW * index + _ROW / 2 - 2
        estimate = read_estimate(area.get(role))
        parts.append(label(left, y + 4, title, "bar-name"))
        if estimate is None:
            parts.append(label(scale(0.0) + 6, y + 4, NOT_MEASURED, "tick"))
            continue
        tip = f"{area_name}, {title.lower()}: {metric_title(metric).lower()} {_words(estimate)}"
        parts.append(group([element("title", tip), *_bar(estimate, scale, y)], class_=f"bar role-{role}"))
        parts.append(label(left + width, y + 4, percent(estimate.value), "bar-value", "end"))
    return group(parts)


def _bar(estimate: Estimate, scale: Scale, y: float) -> list[Markup]:
    start, end = scale(0.0), scale(estimate.value)
    low, high = scale(estimate.low), scale(estimate.high)
    return [
        # The whole row answers to the pointer, so that a bar of length zero has its tooltip too.
        element("rect", x=start, y=y - 9, width=scale.stop - start, height=18.0, class_="hit"),
        element("rect", x=start, y=y - 6, width=max(1.5, end - start), height=12.0, rx=2.0, class_="fill"),
        line(low, y, high, y, "halo"),
        line(low, y, high, y, "whisker"),
        line(low, y - 3.5, low, y + 3.5, "whisker"),
        line(high, y - 3.5, high, y + 3.5, "whisker"),
    ]


def draw_strip(values: Sequence[tuple[str, str, Estimate]], *, name: str, title: str, high: float = 1.0) -> Markup:
    """Return a small line from 0 to `high` with one lettered disc per model: what moved, at a glance.

    Args:
        values: Role, title and estimate, drawn in this order: the last lies on top.
        name: Id of the element, unique on the page.
        title: Accessible name.
        high: Value at the right end.
    """
    scale = Scale(0.0, high, 9.0, 191.0)
    body = [line(scale(0.0), 20, scale(high), 20, "axis")]
    body += [line(scale(high * share), 16, scale(high * share), 24, "axis") for share in (0.0, 0.5, 1.0)]
    for role, _, estimate in values:
        body.append(line(scale(estimate.low), 20, scale(estimate.high), 20, f"range role-{role}"))
    lanes: list[float] = []
    for role, model, estimate in values:
        x = scale(estimate.value)
        # Discs that would hide each other step aside: one up, one down.
        crowd = sum(abs(x - other) < 15 for other in lanes)
        lanes.append(x)
        y = 20.0 + (0.0, -12.0, 12.0)[min(crowd, 2)]
        body.append(role_disc(role, model, x, y, 7.5))
    spoken = ", ".join(f"{model} {number(estimate.value)}" for _, model, estimate in values)
    return picture(name, title, spoken, 200, 40, body)


def _words(estimate: Estimate) -> str:
    return f"{percent(estimate.value)} ({interval(estimate.low, estimate.high)}, n = {estimate.n:,})"


def _description(areas: Sequence[Mapping[str, Any]], roles: Sequence[tuple[str, str]]) -> str:
    sentences = []
    for area in areas:
        found = []
        for role, title in roles:
            estimate = read_estimate(area.get(role))
            found.append(f"{title.lower()} {percent(estimate.value) if estimate else NOT_MEASURED}")
        sentences.append(f"{words(str(area['area']))}: {', '.join(found)}.")
    return " ".join(sentences)
