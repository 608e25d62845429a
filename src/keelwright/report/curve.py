# SPDX-License-Identifier: Apache-2.0
"""Draws the safety-utility curve: every trial, the Pareto front, the three models, and the utility floor.

Up is always safer and right is always more useful: an axis whose metric is better when lower is turned around.
Without a utility the horizontal axis is the distance from the tuned weights, smallest at the right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from markupsafe import Markup

from keelwright.core.records import Estimate
from keelwright.report.axes import Box, LabelSpace, text_width
from keelwright.report.curve_plan import Canvas, Point, close_up, plan_canvas, plan_points
from keelwright.report.reading import Reading
from keelwright.report.svg import SHAPES, element, group, label, line, marker, picture, role_disc
from keelwright.report.text import Unit, interval, metric_title, number, percent, quantity

_DISC = 10.0
_MARK = 5.0
_RING = 9.0
_LINK_STEPS = 48


def method_shapes(reading: Reading) -> dict[str, str]:
    """Return the mark of each method, in the order in which methods were tried."""
    methods = list(dict.fromkeys(trial.method for trial in reading.trials))
    return {method: SHAPES[index % len(SHAPES)] for index, method in enumerate(methods)}


def draw_curve(reading: Reading, *, name: str, width: float, is_close_up: bool = False) -> Markup | None:
    """Return the curve as one `svg` element, or None where there is nothing to draw.

    Args:
        reading: The summary.
        name: Id of the element, unique on the page.
        width: Width of the drawing in user units; narrow ones get fewer ticks and labels.
        is_close_up: Show only the crowd around the choice, without the intervals of trials.
    """
    points = plan_points(reading)
    crowd = close_up(reading, points)
    if is_close_up:
        points, crowd = crowd, []
    if not points:
        return None
    canvas = plan_canvas(reading, points, width, is_close_up=is_close_up)
    leaders, names = _labels(canvas, points, crowd)
    body = [
        *_frame(canvas, reading.primary),
        *_floor_line(canvas),
        *_front(canvas, points),
        *_error_bars(canvas, points),
        *_close_up_frame(canvas, crowd),
        *leaders,
        *_trial_marks(canvas, points, method_shapes(reading), reading),
        *_chosen_link(canvas, points),
        *_role_marks(canvas, points, reading),
        *names,
    ]
    title = _title(reading, canvas)
    return picture(name, title, _description(reading, points, canvas), width, canvas.height, body)


def _frame(canvas: Canvas, primary: str) -> list[Markup]:
    plot = canvas.plot
    body = []
    for tick in canvas.y_ticks:
        y = canvas.y(tick)
        body += [
            line(plot.left, y, plot.right, y, "grid"),
            label(plot.left - 8, y + 4, tick_text(tick, "rate"), "tick", "end"),
        ]
    for tick in canvas.x_ticks:
        x = canvas.x(tick)
        body += [
            line(x, plot.top, x, plot.bottom, "grid"),
            label(x, plot.bottom + 18, tick_text(tick, canvas.x_unit), "tick", "middle"),
        ]
    body.append(line(plot.left, plot.bottom, plot.right, plot.bottom, "axis"))
    body.append(line(plot.left, plot.top, plot.left, plot.bottom, "axis"))
    title = "Utility, right is more useful \u2192"
    if canvas.x_metric == "change":
        title = "Distance from the tuned weights, right is closer \u2192"
    body.append(label(plot.right, plot.bottom + 42, title, "axis-title", "end"))
    body.append(label(4, 16, f"\u2191 {metric_title(primary)}, up is safer", "axis-title"))
    return body


def tick_text(value: float, unit: Unit) -> str:
    """Return a tick without needless zeros."""
    return f"{100 * value:g}%" if unit == "rate" else f"{value:g}"


def _floor_line(canvas: Canvas) -> list[Markup]:
    if canvas.floor is None:
        return []
    x, plot = canvas.x(canvas.floor), canvas.plot
    shade = element(
        "rect", x=plot.left, y=plot.top, width=max(0.0, x - plot.left), height=plot.bottom - plot.top, class_="below"
    )
    return [shade, line(x, plot.top, x, plot.bottom, "floor")]


def _front(canvas: Canvas, points: Sequence[Point]) -> list[Markup]:
    front = sorted((point for point in points if point.trial and point.trial.is_on_front), key=_by_x)
    if len(front) < 2:
        return []
    path = " ".join(f"{canvas.x(point.x.value):.1f},{canvas.y(point.y.value):.1f}" for point in front)
    return [element("polyline", points=path, class_="front")]


def _by_x(point: Point) -> float:
    return point.x.value


def _error_bars(canvas: Canvas, points: Sequence[Point]) -> list[Markup]:
    bars = []
    for point in points:
        if canvas.is_close_up and not point.role:
            continue
        x, y = canvas.x(point.x.value), canvas.y(point.y.value)
        class_ = f"error role-{point.role}" if point.role else "error"
        bars.append(line(x, canvas.y(point.y.low), x, canvas.y(point.y.high), class_))
        if point.x.low != point.x.high:
            bars.append(line(canvas.x(point.x.low), y, canvas.x(point.x.high), y, class_))
    return bars


def _trial_marks(canvas: Canvas, points: Sequence[Point], shapes: dict[str, str], reading: Reading) -> list[Markup]:
    """Draw the trials; those that fall on the same spot share one tooltip that names them all."""
    spots: dict[tuple[int, int], list[Point]] = defaultdict(list)
    for point in points:
        if point.trial:
            spots[(round(canvas.x(point.x.value)), round(canvas.y(point.y.value)))].append(point)
    marks = []
    for here in spots.values():
        # Hollow first: where an admissible trial shares the spot, its filled mark stays on top.
        here.sort(key=lambda point: bool(point.trial and point.trial.is_admissible))
        shown = [
            marker(
                shapes[point.trial.method],
                canvas.x(point.x.value),
                canvas.y(point.y.value),
                _MARK,
                "trial in" if point.trial.is_admissible else "trial out",
            )
            for point in here
            if point.trial
        ]
        tip = "\n\n".join(_tooltip(point, canvas, reading) for point in here)
        marks.append(group([element("title", tip), *shown]))
    return marks


def _tooltip(point: Point, canvas: Canvas, reading: Reading) -> str:
    lines = [point.name]
    if canvas.x_metric == "utility":
        lines.append(f"Utility {_full(point.x, canvas.x_unit)}")
    else:
        lines.append(f"Distance from tuned {number(point.x.value)}")
    lines.append(f"{metric_title(reading.primary)} {_full(point.y, 'rate')}")
    if point.trial:
        lines.append("Admissible" if point.trial.is_admissible else "Not admissible: " + point.trial.reason)
    return "\n".join(lines)


def _full(estimate: Estimate, unit: Unit) -> str:
    return f"{quantity(estimate.value, unit)} ({interval(estimate.low, estimate.high, unit)}, n = {estimate.n:,})"


def _close_up_frame(canvas: Canvas, crowd: Sequence[Point]) -> list[Markup]:
    """Show where the close-up lies in the whole picture."""
    if not crowd:
        return []
    xs = [canvas.x(point.x.value) for point in crowd]
    ys = [canvas.y(point.y.value) for point in crowd]
    left, top = min(xs) - _DISC - 4, min(ys) - _DISC - 3
    width, height = max(xs) + _DISC + 4 - left, max(ys) + _DISC + 3 - top
    return [element("rect", x=left, y=top, width=width, height=height, rx=4, class_="lens")]


def _chosen_link(canvas: Canvas, points: Sequence[Point]) -> list[Markup]:
    """Join the choice on the selection half with the same model on the verification half."""
    chosen = next((point for point in points if point.trial and point.trial.is_chosen), None)
    if chosen is None:
        return []
    x, y = canvas.x(chosen.x.value), canvas.y(chosen.y.value)
    ring = element("circle", cx=x, cy=y, r=_RING, class_="ring")
    repaired = next((point for point in points if point.role == "repaired"), None)
    if repaired is None:
        return [ring]
    return [line(x, y, canvas.x(repaired.x.value), canvas.y(repaired.y.value), "link"), ring]


def _role_marks(canvas: Canvas, points: Sequence[Point], reading: Reading) -> list[Markup]:
    return [
        group(
            [
                element("title", _tooltip(point, canvas, reading)),
                role_disc(point.role, point.name, canvas.x(point.x.value), canvas.y(point.y.value), _DISC),
            ]
        )
        for point in points
        if point.role
    ]


def _labels(canvas: Canvas, points: Sequence[Point], crowd: Sequence[Point]) -> tuple[list[Markup], list[Markup]]:
    """Name the models always, trials only where there is room: the chosen one and the front come first.

    Returns the lines from far labels to their marks, which belong below the marks, and the labels themselves.
    Trials of the `crowd` have their names in the close-up.
    """
    space = _free_space(canvas, points)
    leaders: list[Markup] = []
    names = _floor_label(canvas, space)
    wanted = [(point, f"role-label role-{point.role}", 13.5, _DISC + 5) for point in points if point.role]
    trials = [point for point in points if point.trial and point not in crowd]
    for point in sorted(trials, key=_label_rank):
        rank = _label_rank(point)
        if rank < 2 or canvas.width > 500 or canvas.is_close_up:
            gap = _RING + 3 if _is_chosen(point) else _MARK + 4
            wanted.append((point, "trial-label" if rank < 2 else "trial-label quiet", 10.5, gap))
    for point, class_, size, gap in wanted:
        leader, name = _label(canvas, space, point, class_, size=size, gap=gap)
        leaders += leader
        names += name
    return leaders, names


def _is_chosen(point: Point) -> bool:
    return point.trial is not None and point.trial.is_chosen


def _label_rank(point: Point) -> int:
    trial = point.trial
    if trial is None or trial.is_chosen:
        return 0
    return 1 if trial.is_on_front else 2


def _free_space(canvas: Canvas, points: Sequence[Point]) -> LabelSpace:
    """Keep labels off the marks, off the strong interval lines of the models, and off the link between halves."""
    space = LabelSpace(canvas.plot)
    joined = [point for point in points if _is_chosen(point)] + [point for point in points if point.role == "repaired"]
    if len(joined) == 2:
        (x, y), (far_x, far_y) = ((canvas.x(point.x.value), canvas.y(point.y.value)) for point in joined)
        for step in range(1, _LINK_STEPS):
            share = step / _LINK_STEPS
            space.block(x + share * (far_x - x), y + share * (far_y - y), 2.0)
    for point in points:
        x, y = canvas.x(point.x.value), canvas.y(point.y.value)
        space.block(x, y, _DISC if point.role else _RING if _is_chosen(point) else _MARK + 1)
        if point.role:
            ends = sorted((canvas.y(point.y.low), canvas.y(point.y.high)))
            space.block_boxes(
                [
                    Box(canvas.x(point.x.low), y - 1.5, canvas.x(point.x.high), y + 1.5),
                    Box(x - 1.5, ends[0], x + 1.5, ends[1]),
                ]
            )
    return space


def _floor_label(canvas: Canvas, space: LabelSpace) -> list[Markup]:
    if canvas.floor is None:
        return []
    x, text, bottom = canvas.x(canvas.floor), "utility floor", canvas.plot.bottom
    width = text_width(text, 11)
    is_left = x - width - 6 > canvas.plot.left
    left = x - 6 - width if is_left else x + 6
    space.block_boxes([Box(left, bottom - 20, left + width, bottom), Box(x - 1.5, canvas.plot.top, x + 1.5, bottom)])
    return [label(x - 6 if is_left else x + 6, bottom - 7, text, "floor-label", "end" if is_left else "start")]


def _label(
    canvas: Canvas, space: LabelSpace, point: Point, class_: str, *, size: float, gap: float
) -> tuple[list[Markup], list[Markup]]:
    """Place one label; with a line back to its mark where it moves far, as trials may in the close-up only."""
    x, y = canvas.x(point.x.value), canvas.y(point.y.value)
    reach: tuple[float, ...] = (0.0, 6.0)
    if point.role or canvas.is_close_up:
        reach = (0.0, 10.0, 22.0, 36.0, 54.0, 76.0, 100.0) if point.role else (0.0, 8.0, 18.0, 30.0)
    place = space.place(x, y, point.name, size=size, gap=gap, reach=reach)
    if place is None:
        return [], []
    name = label(place.x, place.y, point.name, class_)
    if len(reach) == 2 or not place.far:
        return [], [name]
    end_x = min(max(x, place.box.left), place.box.right)
    end_y = min(max(y, place.box.top), place.box.bottom)
    return [line(x, y, end_x, end_y, "leader")], [name]


def _title(reading: Reading, canvas: Canvas) -> str:
    against = "utility" if canvas.x_metric == "utility" else "distance from the tuned weights"
    what = "close-up of the crowded part" if canvas.is_close_up else "every trial and the compared models"
    return f"{metric_title(reading.primary)} against {against}, {what}"


def _description(reading: Reading, points: Sequence[Point], canvas: Canvas) -> str:
    trials = [point.trial for point in points if point.trial]
    parts = [f"{len(trials)} trials, {sum(trial.is_admissible for trial in trials)} of them admissible."]
    for point in points:
        if point.role:
            against = "utility" if canvas.x_metric == "utility" else "distance"
            value = f"{metric_title(reading.primary).lower()} {percent(point.y.value)}"
            parts.append(f"{point.name}: {value}, {against} {quantity(point.x.value, canvas.x_unit)}.")
    parts.append("The table below the figure holds every value.")
    return " ".join(parts)
