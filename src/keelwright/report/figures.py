# SPDX-License-Identifier: Apache-2.0
"""The page's figures: each panel in a wide and a narrow drawing, and the table of the values.

One drawing scaled down to a telephone would have text of five pixels, so both are in the page and the style sheet
shows one; the other is hidden from every reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from keelwright.report.bars import draw_areas
from keelwright.report.curve import draw_curve, method_shapes
from keelwright.report.reading import Reading
from keelwright.report.svg import element, marker, role_disc
from keelwright.report.tables import Table, areas_table, points_table

WIDE = 720.0
NARROW = 330.0


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """A small drawing, hidden from screen readers, and what it stands for."""

    mark: Markup
    text: str


@dataclass(frozen=True, slots=True)
class Panel:
    """Two drawings of the same values; `title` is empty where the figure's own heading says enough."""

    title: str
    wide: Markup
    narrow: Markup


@dataclass(frozen=True, slots=True)
class Figure:
    """The panels, their legend, and the values as a table."""

    name: str
    panels: tuple[Panel, ...]
    legend: tuple[LegendEntry, ...]
    table: Table


def safety_utility_curve(reading: Reading) -> Figure | None:
    """Return the curve of every trial, with a close-up where marks crowd, or None where there is nothing to draw."""
    panels = []
    closer = f"Close-up around the {'choice' if reading.chosen else 'best trade-off'}"
    for name, title, is_close_up in (("curve", "", False), ("close-up", closer, True)):
        wide = draw_curve(reading, name=f"{name}-wide", width=WIDE, is_close_up=is_close_up)
        narrow = draw_curve(reading, name=f"{name}-narrow", width=NARROW, is_close_up=is_close_up)
        if wide is not None and narrow is not None:
            panels.append(Panel(title, wide, narrow))
    return Figure("curve", tuple(panels), _legend(reading), points_table(reading)) if panels else None


def area_bars(areas: Sequence[Mapping[str, Any]], roles: Sequence[tuple[str, str]], metric: str) -> Figure | None:
    """Return bars of `metric` per hazard area for each of `roles` (key and title), or None without areas."""
    wide = draw_areas(areas, roles, metric, name="areas-wide", width=WIDE)
    narrow = draw_areas(areas, roles, metric, name="areas-narrow", width=NARROW)
    if wide is None or narrow is None:
        return None
    return Figure("areas", (Panel("", wide, narrow),), (), areas_table(areas, roles, metric))


def _legend(reading: Reading) -> tuple[LegendEntry, ...]:
    shapes = method_shapes(reading)
    entries = [LegendEntry(_small(marker(shape, 9, 9, 5, "trial in")), method) for method, shape in shapes.items()]
    if reading.trials:
        first = next(iter(shapes.values()))
        entries.append(LegendEntry(_small(marker(first, 9, 9, 5, "trial out")), "hollow: not admissible"))
    if any(trial.is_on_front for trial in reading.trials):
        entries.append(LegendEntry(_small(element("path", d="M1 4.5 H10 V16", class_="front")), "Pareto front"))
    if reading.chosen:
        entries.append(LegendEntry(_small(element("circle", cx=9, cy=9, r=7, class_="ring")), "chosen trial"))
    entries += [
        LegendEntry(_small(role_disc(role, title, 9, 9, 8)), title.lower())
        for role, title in ((role, reading.role_title(role)) for role in reading.roles)
    ]
    return tuple(entries)


def _small(mark: Markup) -> Markup:
    return element("svg", mark, viewBox="0 0 18 18", width=18, height=18, aria_hidden="true", class_="key")
