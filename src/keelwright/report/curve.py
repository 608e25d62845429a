# SPDX-License-Identifier: Apache-2.0
"""Draws the safety-utility curve: every trial, the Pareto front, the three models, and the utility floor.

Up is always safer and right is always more useful: an axis whose metric is better when lower is turned around.
Without a utility the horizontal axis is the distance from the tuned weights, smallest at the right.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from keelwright.core.records import Estimate
from keelwright.report.curve_labels import DISC, MARK, RING, draw_labels, plan_labels, spots_of
from keelwright.report.curve_plan import Canvas, Point, close_up, front_path, plan_canvas, plan_points
from keelwright.report.reading import Reading
from keelwright.report.svg import SHAPES, element, group, label, line, marker, picture, role_disc
from keelwright.report.text import Unit, interval, metric_title, number, percent, quantity


def method_shapes(reading: Reading) -> dict[str, str]:
    """Return the mark of each method, in the order in which methods were tried."""
    methods = list(dict.fromkeys(trial.method for trial in reading.whole_trials))
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
    leaders, names = draw_labels(canvas, plan_labels(canvas, points, crowd))
    body = [
        *_frame(canvas, reading.primary),
        *_floor_line(canvas),
        *_front(canvas),
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


def _front(canvas: Canvas) -> list[Markup]:
    path = front_path(canvas)
    if not path:
        return []
    names = ", ".join(point.name for point in canvas.front)
    tip = f"Pareto front: no trial is better in one respect and no worse in the other than {names}"
    drawn = "M" + "M".join(f"{step.x1:.1f} {step.y1:.1f}L{step.x2:.1f} {step.y2:.1f}" for step in path)
    return [group([element("title", tip), element("path", d=drawn, class_="front")])]


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
    marks = []
    for here in spots_of(canvas, points):
        # Hollow first: where an admissible trial shares the spot, its filled mark stays on top.
        here.sort(key=lambda point: bool(point.trial and point.trial.is_admissible))
        shown = [
            marker(
                shapes[point.trial.method],
                canvas.x(point.x.value),
                canvas.y(point.y.value),
                MARK,
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
    left, top = min(xs) - DISC - 4, min(ys) - DISC - 3
    width, height = max(xs) + DISC + 4 - left, max(ys) + DISC + 3 - top
    return [element("rect", x=left, y=top, width=width, height=height, rx=4, class_="lens")]


def _chosen_link(canvas: Canvas, points: Sequence[Point]) -> list[Markup]:
    """Join the choice on the selection half with the same model on the verification half."""
    chosen = next((point for point in points if point.trial and point.trial.is_chosen), None)
    if chosen is None:
        return []
    x, y = canvas.x(chosen.x.value), canvas.y(chosen.y.value)
    ring = element("circle", cx=x, cy=y, r=RING, class_="ring")
    repaired = next((point for point in points if point.role == "repaired"), None)
    if repaired is None:
        return [ring]
    return [line(x, y, canvas.x(repaired.x.value), canvas.y(repaired.y.value), "link"), ring]


def _role_marks(canvas: Canvas, points: Sequence[Point], reading: Reading) -> list[Markup]:
    return [
        group(
            [
                element("title", _tooltip(point, canvas, reading)),
                role_disc(point.role, point.name, canvas.x(point.x.value), canvas.y(point.y.value), DISC),
            ]
        )
        for point in points
        if point.role
    ]


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
