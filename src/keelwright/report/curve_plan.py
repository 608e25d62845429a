# SPDX-License-Identifier: Apache-2.0
"""Plans the safety-utility curve: its points, its axes, and whether a crowded corner deserves a close-up."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from keelwright.core.records import Estimate
from keelwright.report.axes import Box, Scale, Segment, nice_ticks
from keelwright.report.reading import Reading, Trial
from keelwright.report.text import METRICS, Unit

_REACH_X = 0.25
_REACH_Y = 0.12
"""A close-up shows what lies within these shares of the axes around its centre."""
_CROWD = 5
"""So many points there are too many to tell apart in the whole picture."""
_WIDE = 500.0


@dataclass(frozen=True, slots=True)
class Point:
    """A dot of the figure with the interval of each axis."""

    name: str
    x: Estimate
    y: Estimate
    trial: Trial | None = None
    role: str = ""


@dataclass(frozen=True, slots=True)
class Canvas:
    """Where the plot lies and how values map to positions."""

    width: float
    height: float
    plot: Box
    x: Scale
    y: Scale
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]
    x_unit: Unit
    x_metric: str
    """`utility`, or `change` where no utility was measured."""
    floor: float | None
    """The utility floor, where it lies in the picture."""
    is_close_up: bool
    front: tuple[Point, ...] = ()
    """The Pareto front, those of its trials that are not shown included."""

    @property
    def is_wide(self) -> bool:
        """Whether the drawing is the one for a wide window."""
        return self.width > _WIDE

    def spot(self, point: Point) -> tuple[float, float]:
        """Return where the centre of a mark lies."""
        return self.x(point.x.value), self.y(point.y.value)


def utility_floor(reading: Reading) -> float | None:
    """Return the utility below which no trial is admissible: as asked on the selection half, else from the floors."""
    for limit in reading.summary.get("limits") or ():
        if limit["name"] == "utility" and limit["half"] == "selection" and isinstance(limit.get("limit"), float):
            return float(limit["limit"])
    tuned = reading.estimate("tuned", "utility")
    share = (reading.summary.get("floors") or {}).get("utility_floor")
    return tuned.value * float(share) if tuned is not None and share is not None else None


def plan_points(reading: Reading) -> list[Point]:
    """Return every point that has both coordinates: the models on the verification half, then the trials."""
    return [*_role_points(reading), *_trial_points(reading)]


def x_metric_of(reading: Reading) -> str:
    """Return what the horizontal axis shows: `utility`, or `change` where no utility was measured."""
    return "utility" if reading.has_utility else "change"


def close_up(reading: Reading, points: Sequence[Point]) -> list[Point]:
    """Return the points around the choice (or the best trade-off) when they crowd, else none.

    Without a trial to look at there is no close-up; neither is there one when all points are close together, as the
    whole picture then shows the same.
    """
    centre = reading.best_trade_off()
    here = next((point for point in points if point.trial is not None and point.trial == centre), None)
    if here is None:
        return []
    reach_x, reach_y = _REACH_X * _span([point.x for point in points]), _REACH_Y * _span([point.y for point in points])
    near = [
        point
        for point in points
        if point.role == "repaired"
        or (abs(point.x.value - here.x.value) <= reach_x and abs(point.y.value - here.y.value) <= reach_y)
    ]
    return near if _CROWD <= len(near) < len(points) else []


def _span(estimates: Sequence[Estimate]) -> float:
    values = [estimate.value for estimate in estimates]
    return max(values) - min(values)


def _role_points(reading: Reading) -> list[Point]:
    x_metric = x_metric_of(reading)
    points = []
    for role in reading.roles:
        y = reading.estimate(role, reading.primary)
        if x_metric == "utility":
            x = reading.estimate(role, "utility")
        else:
            # The aligned model's own distance is not in the summary; the tuned one is the origin.
            chosen = reading.chosen
            distance = {"tuned": 0.0, "repaired": chosen.change if chosen else None}.get(role)
            x = None if distance is None else Estimate(distance, distance, distance, 1)
        if x is not None and y is not None:
            points.append(Point(reading.role_title(role), x, y, role=role))
    return points


def _trial_points(reading: Reading) -> list[Point]:
    x_metric = x_metric_of(reading)
    points = []
    for trial in reading.whole_trials:
        y = trial.metrics.get(reading.primary)
        x = trial.metrics.get("utility")
        if x_metric == "change":
            x = None if trial.change is None else Estimate(trial.change, trial.change, trial.change, 1)
        if x is not None and y is not None:
            points.append(Point(trial.name, x, y, trial=trial))
    return points


def front_path(canvas: Canvas) -> list[Segment]:
    """Return the edge of what was reached, in steps from the left of the plot to its bottom, as far as it is shown.

    Every trial lies on it, below it or left of it. It is a staircase, because between two trials of the front nothing
    better than the lesser of both was seen; and so even a front of one trial has a line.
    """
    front = sorted((canvas.x.anywhere(point.x.value), canvas.y.anywhere(point.y.value)) for point in canvas.front)
    if not front:
        return []
    corners = [(min(canvas.plot.left, front[0][0]), front[0][1])]
    for x, y in front:
        corners += [(corners[-1][0], y), (x, y)]
    corners.append((front[-1][0], max(canvas.plot.bottom, front[-1][1])))
    steps = (Segment(*start, *end).within(canvas.plot) for start, end in itertools.pairwise(corners))
    return [step for step in steps if step is not None]


def plan_canvas(reading: Reading, points: Sequence[Point], width: float, *, is_close_up: bool = False) -> Canvas:
    """Return the axes that show `points`: with their intervals, or in a close-up without."""
    is_wide = width > _WIDE
    height = (360.0 if is_close_up else 430.0) if is_wide else 390.0
    plot = Box(58.0 if is_wide else 46.0, 34.0, width - 16.0, height - 54.0)
    x_metric = x_metric_of(reading)
    floor = utility_floor(reading) if x_metric == "utility" and reading.trials else None
    ends = [end for point in points for end in _ends(point.x, is_close_up=is_close_up)]
    if is_close_up and floor is not None and not min(ends) <= floor <= max(ends):
        floor = None
    ends += [floor] if floor is not None else []
    x_ticks = nice_ticks(max(0.0, min(ends)), max(ends), 6 if is_wide else 4)
    rates = [end for point in points for end in _ends(point.y, is_close_up=is_close_up)]
    y_ticks = nice_ticks(max(0.0, min(rates)), min(1.0, max(*rates, min(rates) + 0.02)), 5)
    # Room at both ends, so that a perfect score does not sit on the frame.
    pad = 16.0
    y_range = (plot.bottom - pad, plot.top + pad)
    if METRICS[reading.primary].lower_is_better:
        y_range = (y_range[1], y_range[0])
    x_range = (plot.left + pad, plot.right - pad)
    if x_metric == "change":
        x_range = (x_range[1], x_range[0])
    return Canvas(
        width=width,
        height=height,
        plot=plot,
        x=Scale(x_ticks[0], x_ticks[-1], *x_range),
        y=Scale(y_ticks[0], y_ticks[-1], *y_range),
        x_ticks=tuple(x_ticks),
        y_ticks=tuple(y_ticks),
        x_unit=reading.utility_unit if x_metric == "utility" else "number",
        x_metric=x_metric,
        floor=floor,
        is_close_up=is_close_up,
        front=tuple(point for point in _trial_points(reading) if point.trial and point.trial.is_on_front),
    )


def _ends(estimate: Estimate, *, is_close_up: bool) -> tuple[float, ...]:
    return (estimate.value,) if is_close_up else (estimate.low, estimate.high)
