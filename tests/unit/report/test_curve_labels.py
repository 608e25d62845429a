# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keelwright.report.curve_labels import plan_labels, spots_of
from keelwright.report.curve_plan import close_up, plan_canvas, plan_points
from keelwright.report.figures import NARROW, WIDE
from keelwright.report.reading import read_summary

VERDICTS = ("repaired", "no_evidence_of_loss", "no_admissible_repair", "repair_not_verified")


def drawings(summary):
    """Axes, points, and the crowd that is named elsewhere, of every drawing of a curve."""
    reading = read_summary(summary)
    points = plan_points(reading)
    crowd = close_up(reading, points)
    for width in (WIDE, NARROW):
        yield plan_canvas(reading, points, width), points, crowd
        if crowd:
            yield plan_canvas(reading, crowd, width, is_close_up=True), crowd, []


def check(canvas, points, crowd):
    """Every label is nearest to its own mark, or has a line that ends there and at no other."""
    named = plan_labels(canvas, points, crowd)
    spots = [spot[0] for spot in spots_of(canvas, points)]
    centres = [canvas.spot(point) for point in (*spots, *(point for point in points if point.role))]
    for one in named:
        own = (one.mark.x, one.mark.y)
        assert own in centres
        others = [centre for centre in centres if centre != own]
        if one.place.leader is None:
            assert all(one.place.box.distance(*own) < one.place.box.distance(*other) for other in others), one.text
        else:
            start = (one.place.leader.x1, one.place.leader.y1)
            assert math.dist(start, own) == pytest.approx(one.mark.radius), one.text
            assert all(one.place.leader.distance(*other) > 6 for other in others), one.text
    for one, other in itertools.combinations(named, 2):
        assert not one.place.box.overlaps(other.place.box), (one.text, other.text)
    return named


@pytest.mark.parametrize("verdict", VERDICTS)
def test_no_label_of_the_sample_runs_names_another_mark(summary_for, verdict):
    assert sum(len(check(*one)) for one in drawings(summary_for(verdict))) >= 4


def test_no_label_of_a_demo_names_another_mark(real_summary):
    for one in drawings(real_summary):
        check(*one)


def test_every_trial_of_a_demo_has_its_name_on_a_wide_page(real_summary):
    canvas, points, crowd = next(iter(drawings(real_summary)))
    named = {one.text for one in plan_labels(canvas, points, crowd)}
    assert named == {point.name for point in points} - {point.name for point in crowd if point.trial}
    assert "resta 0.5" in named
    assert "resta 0.4688" in named


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 190)), min_size=1, max_size=16))
def test_no_label_of_any_run_names_another_mark(summary_for, rows):
    summary = summary_for()
    model = summary["trials"][0]
    trials = []
    for index, (right, harmful) in enumerate(rows):
        one = json.loads(json.dumps(model))
        for metric, share in (("utility", right / 400), ("harm_rate", harmful / 190)):
            one["metrics"][metric].update(value=share, low=max(0.0, share - 0.04), high=min(1.0, share + 0.04))
        trials.append({**one, "coefficients": {"coefficient": index / 100}})
    summary.update(trials=trials, chosen=0, pareto=[0])
    for one in drawings(summary):
        check(*one)


def test_trials_on_one_spot_share_a_name(summary_for):
    summary = summary_for()
    twin = {**summary["trials"][1], "method": "resta", "coefficients": {"coefficient": 9.0}}
    names = []
    for count in (1, 2):
        made = {**summary, "trials": [*summary["trials"], *[twin] * count]}
        canvas, points, crowd = next(iter(drawings(made)))
        names += [one.text for one in plan_labels(canvas, points, crowd) if one.text.startswith("linear 0.1")]
    assert names == ["linear 0.1, resta 9", "linear 0.1 and 2 more"]
