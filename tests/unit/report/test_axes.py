# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keelwright.report.axes import Box, LabelSpace, Scale, nice_ticks, text_width


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


def test_labels_never_overlap_marks_labels_or_the_frame():
    bounds = Box(0, 0, 300, 200)
    space = LabelSpace(bounds)
    marks = [(150 + 3 * i, 100 + 2 * i) for i in range(12)]
    for x, y in marks:
        space.block(x, y, 5)
    placed = [space.place(x, y, f"trial {i}", size=10, gap=8, reach=(0, 10, 30)) for i, (x, y) in enumerate(marks)]
    boxes = [one.box for one in placed if one]
    assert boxes
    for index, box in enumerate(boxes):
        assert box.inside(bounds)
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
        assert not any(box.overlaps(Box(x - 5, y - 5, x + 5, y + 5)) for x, y in marks)


def test_a_label_without_room_is_left_out():
    space = LabelSpace(Box(0, 0, 20, 20))
    assert space.place(10, 10, "a long label", size=12, gap=5) is None


def test_a_label_prefers_the_right_side_and_says_when_it_is_far():
    space = LabelSpace(Box(0, 0, 300, 200))
    near = space.place(100, 100, "abc", size=10, gap=8, reach=(0, 20))
    assert near.x == 108
    assert not near.far
    space = LabelSpace(Box(0, 0, 300, 200))
    space.block(100, 100, 20)
    assert space.place(100, 100, "abc", size=10, gap=8, reach=(0, 20)).far


def test_text_width_grows_with_size_and_length():
    assert text_width("abcd", 10) == 2 * text_width("ab", 10) == text_width("ab", 20)
