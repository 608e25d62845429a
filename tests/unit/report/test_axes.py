# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keelwright.report.axes import Box, Scale, Segment, nice_ticks, text_width


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(1, 10))
def test_ticks_rise_evenly_and_enclose_the_values(low, width, count):
    ticks = nice_ticks(low, low + width, count)
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    slack = 1e-6 * max(1.0, abs(low) + width)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + width - slack
    assert all(step == pytest.approx(steps[0], rel=1e-3, abs=slack) for step in steps)
    assert 1 <= len(steps) <= count + 2


def test_ticks_are_round_numbers():
    assert nice_ticks(0.0, 0.64, 5) == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert nice_ticks(0.78, 0.83, 5) == [0.78, 0.79, 0.8, 0.81, 0.82, 0.83]


@pytest.mark.parametrize("value", [0.0, 0.5, 100.0])
def test_equal_values_still_have_an_axis(value):
    ticks = nice_ticks(value, value)
    assert ticks[0] < value < ticks[-1]


def test_a_scale_maps_ends_to_ends_and_keeps_outliers_inside():
    scale = Scale(0.0, 1.0, 100.0, 0.0)
    assert (scale(0.0), scale(1.0), scale(0.25)) == (100.0, 0.0, 75.0)
    assert (scale(-3.0), scale(7.0)) == (100.0, 0.0)
    assert scale.anywhere(2.0) == -100.0


def test_a_box_knows_how_far_a_place_is():
    box = Box(10, 10, 20, 20)
    assert [box.distance(*place) for place in ((15, 15), (15, 23), (7, 6))] == [0, 3, 5]
    assert box.nearest(0, 12) == (10, 12)


def test_a_line_knows_what_it_runs_through():
    line = Segment(0, 0, 10, 10)
    assert line.crosses(Box(4, 2, 6, 5))
    assert not line.crosses(Box(6, 0, 9, 3))
    assert not line.crosses(Box(11, 11, 20, 20))
    assert Segment(0, 5, 10, 5).crosses(Box(4, 4, 6, 6))
    assert not Segment(0, 4, 10, 4).crosses(Box(4, 4, 6, 6))


def test_lines_meet_only_where_both_reach():
    line = Segment(0, 0, 10, 10)
    assert line.meets(Segment(0, 10, 10, 0))
    assert not line.meets(Segment(0, 10, 4, 6))


def test_the_distance_from_a_line_stops_at_its_ends():
    line = Segment(0, 0, 10, 0)
    assert [line.distance(*place) for place in ((5, 2), (13, 4), (-3, -4))] == [2, 5, 5]
    assert Segment(1, 1, 1, 1).distance(4, 5) == 5


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (Segment(-5, 4, 5, 4), Segment(0, 4, 5, 4)),
        (Segment(5, -9, 5, 99), Segment(5, 0, 5, 10)),
        (Segment(12, 0, 12, 5), None),
        (Segment(0, -1, 9, -1), None),
        (Segment(-9, 4, -1, 4), None),
    ],
)
def test_a_line_is_cut_to_a_box(line, part):
    assert line.within(Box(0, 0, 10, 10)) == part


def test_text_width_grows_with_size_and_length():
    assert text_width("abcd", 10) == 2 * text_width("ab", 10) == text_width("ab", 20)
