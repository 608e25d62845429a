# SPDX-License-Identifier: Apache-2.0
import itertools
import math
import re
import xml.etree.ElementTree as tree

import pytest

from keelwright.report.bars import draw_areas, draw_strip
from keelwright.report.curve import method_shapes
from keelwright.report.curve_plan import close_up, plan_canvas, plan_points, utility_floor
from keelwright.report.figures import area_bars, safety_utility_curve
from keelwright.report.reading import read_estimate, read_summary

ROLES = [("aligned", "Aligned"), ("tuned", "Tuned"), ("repaired", "Repaired")]


def with_class(drawing, class_):
    return [one for one in tree.fromstring(drawing).iter() if class_ in one.get("class", "").split()]


def discs(drawing):
    return {
        one.find("text").text: tuple(float(one.find("circle").get(key)) for key in ("cx", "cy"))
        for one in with_class(drawing, "disc")
    }


@pytest.fixture(scope="module")
def curve(summary_for):
    return safety_utility_curve(read_summary(summary_for()))


def test_every_trial_is_drawn_and_hollow_ones_are_not_admissible(curve, summary_for):
    trials = summary_for()["trials"]
    drawn = curve.panels[0].wide
    assert len(with_class(drawn, "trial")) == len(trials)
    assert len(with_class(drawn, "in")) == sum(one["admissible"] for one in trials)


def test_up_is_safer_and_right_is_more_useful(curve):
    found = discs(curve.panels[0].wide)
    assert set(found) == {"A", "T", "R"}
    assert found["A"][1] < found["R"][1] < found["T"][1]
    assert found["A"][0] < found["R"][0] < found["T"][0]


def test_a_refusal_rate_is_not_turned_around(summary_for):
    summary = {**summary_for(), "primary": "refusal_rate"}
    found = discs(safety_utility_curve(read_summary(summary)).panels[0].wide)
    assert found["A"][1] < found["R"][1] < found["T"][1]


def test_methods_differ_by_shape(curve, summary_for):
    shapes = method_shapes(read_summary(summary_for()))
    assert shapes == {"linear": "circle", "resta": "square"}
    kinds = {one.tag for one in with_class(curve.panels[0].wide, "trial")}
    assert kinds == {"circle", "polygon"}


def test_every_mark_tells_its_values(curve, summary_for):
    tips = " ".join(re.findall(r"<title>(.*?)</title>", curve.panels[0].wide, flags=re.S))
    assert all(f"linear {one}" in tips for one in ("0.4", "0.425", "0.9"))
    assert "Not admissible: over refusal 0.900 is above 0.050" in tips
    assert "Utility 82.0%" in tips


def test_trials_on_one_spot_share_a_tooltip(summary_for):
    summary = summary_for()
    summary["trials"].append({**summary["trials"][0], "method": "resta", "coefficients": {"coefficient": 9.0}})
    drawn = safety_utility_curve(read_summary(summary)).panels[0].wide
    tips = re.findall(r"<title>(.*?)</title>", drawn, flags=re.S)
    assert any("linear 0\n" in tip and "resta 9" in tip for tip in tips)


def test_the_floor_is_drawn_where_it_was_asked(summary_for):
    reading = read_summary(summary_for())
    assert utility_floor(reading) == 0.8075
    canvas = plan_canvas(reading, plan_points(reading), 720.0)
    (line,) = with_class(safety_utility_curve(reading).panels[0].wide, "floor")
    assert float(line.get("x1")) == pytest.approx(canvas.x(0.8075), abs=0.1)


def test_without_limits_the_floor_follows_from_the_share(summary_for):
    summary = {**summary_for(), "limits": []}
    assert utility_floor(read_summary(summary)) == pytest.approx(0.95 * summary["models"]["tuned"]["utility"]["value"])


def path_of(drawing):
    """The front's steps as pairs of places."""
    (front,) = with_class(drawing, "front")
    numbers = [float(one) for one in re.findall(r"[-\d.]+", front.get("d"))]
    places = list(zip(numbers[::2], numbers[1::2], strict=True))
    return list(zip(places[::2], places[1::2], strict=True))


def test_the_front_is_a_staircase_through_the_best_trials(curve, summary_for):
    reading = read_summary(summary_for())
    points = plan_points(reading)
    canvas = plan_canvas(reading, points, 720.0)
    steps = path_of(curve.panels[0].wide)
    assert steps[0][0][0] == canvas.plot.left
    assert steps[-1][1][1] == canvas.plot.bottom
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(steps))
    assert all(x1 == x2 or y1 == y2 for (x1, y1), (x2, y2) in steps)
    corners = {place for step in steps for place in step}
    for point in points:
        if point.trial and point.trial.is_on_front:
            assert any(math.dist(canvas.spot(point), corner) < 0.2 for corner in corners), point.name


def test_no_trial_lies_beyond_the_front(curve, summary_for):
    reading = read_summary(summary_for())
    points = plan_points(reading)
    canvas = plan_canvas(reading, points, 720.0)
    steps = path_of(curve.panels[0].wide)
    for x, y in (canvas.spot(point) for point in points if point.trial):
        above = [y1 for (x1, y1), (x2, y2) in steps if y1 == y2 and x1 - 0.1 <= x <= x2 + 0.1]
        assert above
        assert min(above) <= y + 0.1


def test_a_front_of_one_trial_still_has_a_line_and_a_name(real_summary):
    drawn = safety_utility_curve(read_summary(real_summary)).panels[0].wide
    assert len(path_of(drawn)) == 2
    (name,) = with_class(drawn, "front-label")
    assert name.text == "Pareto front"


def test_without_a_front_there_is_no_line(summary_for):
    drawn = safety_utility_curve(read_summary({**summary_for(), "pareto": []})).panels[0].wide
    assert with_class(drawn, "front") == with_class(drawn, "front-label") == []


def test_a_crowd_gets_a_close_up_with_the_name_of_every_mark_in_sight(curve, summary_for):
    reading = read_summary(summary_for())
    crowd = close_up(reading, plan_points(reading))
    assert reading.chosen in [point.trial for point in crowd]
    assert len(curve.panels) == 2
    assert with_class(curve.panels[0].wide, "lens")
    named = {one.text for one in with_class(curve.panels[1].wide, "trial-label")}
    (repaired,) = [point for point in crowd if point.role]
    hidden = {point.name for point in crowd if (point.x, point.y) == (repaired.x, repaired.y)} - {repaired.name}
    assert hidden == {"resta 0.5"}
    assert named == {point.name for point in crowd if point.trial} - hidden


def test_a_few_trials_need_no_close_up(summary_for):
    summary = summary_for()
    summary.update(trials=summary["trials"][:2], chosen=0, pareto=[0, 1])
    assert len(safety_utility_curve(read_summary(summary)).panels) == 1


def test_without_a_utility_the_axis_is_the_distance(summary_for):
    summary = summary_for()
    summary["utility"] = None
    for one in (*summary["models"].values(), *(trial["metrics"] for trial in summary["trials"])):
        one["utility"] = None
    drawn = safety_utility_curve(read_summary(summary)).panels[0].wide
    found = discs(drawn)
    assert set(found) == {"T", "R"}
    assert found["R"][0] < found["T"][0]
    assert "Distance from the tuned weights" in drawn


def test_without_points_there_is_no_figure(summary_for):
    summary = summary_for("no_evidence_of_loss")
    summary["models"] = dict.fromkeys(summary["models"])
    assert safety_utility_curve(read_summary(summary)) is None
    assert area_bars([], ROLES, "harm_rate") is None


def test_a_bar_is_as_long_as_its_rate(summary_for):
    drawn = draw_areas(summary_for()["areas"], ROLES, "harm_rate", name="a", width=720.0)
    bars = [float(one.get("width")) for one in with_class(drawn, "fill")]
    assert len(bars) == 12
    assert bars[1] / bars[4] == pytest.approx(11 / 8, rel=0.01)
    assert bars[0] == 1.5


def test_an_area_without_a_rate_says_so(summary_for):
    areas = [{"area": "curses", "aligned": None, "tuned": summary_for()["areas"][0]["tuned"]}]
    drawn = draw_areas(areas, ROLES[:2], "harm_rate", name="a", width=330.0)
    assert "not measured" in drawn
    assert "Curses: aligned not measured, tuned 73.3%." in drawn


def test_discs_of_a_strip_do_not_hide_each_other():
    same = read_estimate({"value": 0.5, "low": 0.4, "high": 0.6, "n": 9})
    found = discs(draw_strip([(role, title, same) for role, title in ROLES], name="s", title="t"))
    assert len({y for _, y in found.values()}) == 3
