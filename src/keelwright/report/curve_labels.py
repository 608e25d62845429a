# SPDX-License-Identifier: Apache-2.0
"""Names the marks of the safety-utility curve: the models always, trials wherever a name cannot mislead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from keelwright.report.axes import Box, Segment, text_width
from keelwright.report.curve_plan import Canvas, Point, front_path
from keelwright.report.labels import LabelSpace, Mark, Placed
from keelwright.report.svg import label, line

DISC = 10.0
MARK = 5.0
RING = 9.0
FLOOR_WORDS = "utility floor"
FRONT_WORDS = "Pareto front"
_SAME_SPOT = 2.0
"""Marks nearer than this, in user units, look like one."""
_LINK_STEPS = 48
_ROLE_REACH = (0.0, 10.0, 22.0, 36.0, 54.0, 76.0, 100.0)
_TRIAL_REACH = (0.0, 5.0, 11.0, 18.0, 26.0, 36.0, 48.0)
_NEAR_REACH = (0.0, 5.0)


@dataclass(frozen=True, slots=True)
class Named:
    """A label of the figure: its words, its mark, and where it went."""

    text: str
    class_: str
    mark: Mark
    place: Placed


def spots_of(canvas: Canvas, points: Sequence[Point]) -> list[list[Point]]:
    """Return the trials gathered by spot: those that fall on each other look like one mark, and share its name."""
    spots: list[list[Point]] = []
    for point in points:
        if not point.trial:
            continue
        here = canvas.spot(point)
        near = (spot for spot in spots if math.dist(canvas.spot(spot[0]), here) < _SAME_SPOT)
        found = next(near, None)
        if found is None:
            spots.append([point])
        else:
            found.append(point)
    return spots


def plan_labels(canvas: Canvas, points: Sequence[Point], crowd: Sequence[Point]) -> list[Named]:
    """Return the labels that have room: models first, then the choice, the front, and the other trials.

    Args:
        canvas: Axes of the drawing.
        points: What it shows.
        crowd: Trials whose names are in the close-up instead.
    """
    spots = spots_of(canvas, points)
    marks = [_role_mark(canvas, point) for point in points if point.role]
    space = LabelSpace(canvas.plot, [*marks, *(_spot_mark(canvas, spot) for spot in spots)])
    space.block(_walls(canvas, points))
    space.lines = [*_intervals(canvas, points), *front_path(canvas)]
    named = []
    for point in (point for point in points if point.role):
        mark = _role_mark(canvas, point)
        place = space.place(mark, point.name, size=13.5, gap=5.0, reach=_ROLE_REACH)
        if place is not None:
            named.append(Named(point.name, f"role-label role-{point.role}", mark, place))
    for spot in sorted(spots, key=lambda spot: min(map(_rank, spot))):
        wanted = sorted((point for point in spot if point not in crowd), key=_rank)
        if not wanted:
            continue
        is_quiet = _rank(wanted[0]) == 2
        has_room = canvas.is_wide or canvas.is_close_up or not is_quiet
        mark, text = _spot_mark(canvas, spot), _spot_name(wanted)
        place = space.place(mark, text, size=10.5, gap=3.5, reach=_TRIAL_REACH if has_room else _NEAR_REACH)
        if place is not None:
            named.append(Named(text, "trial-label quiet" if is_quiet else "trial-label", mark, place))
    return named


def draw_labels(canvas: Canvas, named: Sequence[Named]) -> tuple[list[Markup], list[Markup]]:
    """Return the lines from labels to their marks, which belong below the marks, and the labels themselves."""
    lines = [one.place.leader for one in named if one.place.leader]
    leaders = [line(one.x1, one.y1, one.x2, one.y2, "leader") for one in lines]
    texts = [_text(one) for one in named]
    return leaders, [*_floor_label(canvas), *_front_label(canvas), *texts]


def _text(named: Named) -> Markup:
    """Return the label flush with the side of its room that faces its mark: the room is wider than most fonts need."""
    box, y = named.place.box, named.place.y
    if box.right <= named.mark.x:
        return label(box.right, y, named.text, named.class_, "end")
    if named.mark.x <= box.left:
        return label(box.left, y, named.text, named.class_)
    return label((box.left + box.right) / 2, y, named.text, named.class_, "middle")


def _spot_name(points: Sequence[Point]) -> str:
    if len(points) < 3:
        return ", ".join(point.name for point in points)
    return f"{points[0].name} and {len(points) - 1} more"


def _rank(point: Point) -> int:
    trial = point.trial
    if trial is None or trial.is_chosen:
        return 0
    return 1 if trial.is_on_front else 2


def _role_mark(canvas: Canvas, point: Point) -> Mark:
    return Mark(*canvas.spot(point), DISC)


def _spot_mark(canvas: Canvas, spot: Sequence[Point]) -> Mark:
    is_chosen = any(point.trial and point.trial.is_chosen for point in spot)
    # Polygons reach a little beyond the radius of a circle of the same area.
    return Mark(*canvas.spot(spot[0]), RING + 1 if is_chosen else MARK + 1)


def _walls(canvas: Canvas, points: Sequence[Point]) -> list[Box]:
    """Return what no label may cover: strong lines of the models, the link between halves, the fixed labels."""
    walls = [_floor_box(canvas), _front_box(canvas)]
    if canvas.floor is not None:
        x = canvas.x(canvas.floor)
        walls.append(Box(x - 1.5, canvas.plot.top, x + 1.5, canvas.plot.bottom))
    for bar in _intervals(canvas, [point for point in points if point.role]):
        x1, x2 = sorted((bar.x1, bar.x2))
        y1, y2 = sorted((bar.y1, bar.y2))
        walls.append(Box(x1 - 1.5, y1 - 1.5, x2 + 1.5, y2 + 1.5))
    joined = [point for point in points if point.trial and point.trial.is_chosen]
    joined += [point for point in points if point.role == "repaired"]
    if len(joined) == 2:
        (x1, y1), (x2, y2) = (canvas.spot(point) for point in joined)
        for step in range(1, _LINK_STEPS):
            x, y = x1 + step / _LINK_STEPS * (x2 - x1), y1 + step / _LINK_STEPS * (y2 - y1)
            walls.append(Box(x - 2, y - 2, x + 2, y + 2))
    return [wall for wall in walls if wall is not None]


def _intervals(canvas: Canvas, points: Sequence[Point]) -> list[Segment]:
    """Return the interval lines that the drawing shows for `points`."""
    bars = []
    for point in points:
        if point.role or not canvas.is_close_up:
            x, y = canvas.spot(point)
            bars.append(Segment(canvas.x(point.x.low), y, canvas.x(point.x.high), y))
            bars.append(Segment(x, canvas.y(point.y.low), x, canvas.y(point.y.high)))
    return [bar for bar in bars if bar.length]


def _floor_box(canvas: Canvas) -> Box | None:
    if canvas.floor is None:
        return None
    x, bottom, width = canvas.x(canvas.floor), canvas.plot.bottom, text_width(FLOOR_WORDS, 11)
    left = x - 6 - width if x - width - 6 > canvas.plot.left else x + 6
    return Box(left, bottom - 20, left + width, bottom)


def _floor_label(canvas: Canvas) -> list[Markup]:
    box = _floor_box(canvas)
    if canvas.floor is None or box is None:
        return []
    x = canvas.x(canvas.floor)
    is_left = box.left < x
    return [
        label(x - 6 if is_left else x + 6, box.bottom - 7, FLOOR_WORDS, "floor-label", "end" if is_left else "start")
    ]


def _front_box(canvas: Canvas) -> Box | None:
    """Return the room for the front's name: beside the lower end of its line, clear of the floor."""
    path = front_path(canvas)
    if not path or not path[-1].is_upright or path[-1].y2 < canvas.plot.bottom:
        return None
    x, width = path[-1].x2, text_width(FRONT_WORDS, 11)
    floor = _floor_box(canvas)
    for bottom in (canvas.plot.bottom, canvas.plot.bottom - 18):
        for left in (x + 6, x - 6 - width):
            box = Box(left, bottom - 20, left + width, bottom)
            is_clear = floor is None or not (
                box.overlaps(floor) or box.left < canvas.x(canvas.floor or 0.0) < box.right
            )
            if box.inside(canvas.plot) and is_clear:
                return box
    return None


def _front_label(canvas: Canvas) -> list[Markup]:
    box = _front_box(canvas)
    if box is None:
        return []
    is_left = box.left < front_path(canvas)[-1].x2
    x, anchor = (box.right, "end") if is_left else (box.left, "start")
    return [label(x, box.bottom - 7, FRONT_WORDS, "front-label", anchor)]
