# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keelwright.report.axes import Box, Segment
from keelwright.report.labels import LabelSpace, Mark

FRAME = Box(0, 0, 300, 200)
PLACES = st.tuples(st.integers(5, 295), st.integers(5, 195))


@given(st.lists(PLACES, min_size=1, max_size=14, unique=True))
def test_a_label_is_nearest_to_its_own_mark_or_has_a_line_to_it(places):
    marks = [Mark(x, y, 5) for x, y in places]
    space = LabelSpace(FRAME, marks)
    placed = [(mark, space.place(mark, "trial 0.5", size=10, gap=3, reach=(0, 10, 30))) for mark in marks]
    kept = [(mark, found) for mark, found in placed if found]
    for mark, found in kept:
        assert found.box.inside(FRAME)
        assert all(found.box.distance(one.x, one.y) >= one.radius for one in marks)
        away = {one: found.box.distance(one.x, one.y) for one in marks}
        if found.leader is None:
            assert min(away, key=away.get) == mark
            assert list(away.values()).count(away[mark]) == 1
        else:
            ends = found.leader
            assert math.dist((ends.x1, ends.y1), (mark.x, mark.y)) == pytest.approx(mark.radius)
            assert found.box.distance(ends.x2, ends.y2) == pytest.approx(0, abs=1e-9)
            assert all(ends.distance(one.x, one.y) > one.radius for one in marks if one != mark)
    for (_, one), (_, other) in itertools.combinations(kept, 2):
        assert not one.box.overlaps(other.box)
        assert not (one.leader and one.leader.crosses(other.box))
        assert not (one.leader and other.leader and one.leader.meets(other.leader))


def test_a_label_without_room_is_left_out():
    mark = Mark(10, 10, 5)
    assert LabelSpace(Box(0, 0, 20, 20), [mark]).place(mark, "a long label", size=12, gap=3) is None


def test_a_lonely_mark_has_its_label_at_its_right_without_a_line():
    mark = Mark(100, 100, 5)
    found = LabelSpace(FRAME, [mark]).place(mark, "abc", size=10, gap=3, reach=(0, 20))
    assert found.x == 108
    assert found.leader is None


def test_a_label_between_two_marks_gets_a_line():
    mark, other = Mark(100, 100, 5), Mark(100, 114, 5)
    space = LabelSpace(Box(0, 100, 300, 200), [mark, other])
    space.block([Box(0, 100, 300, 112)])
    assert space.place(mark, "abc", size=10, gap=3, reach=(0, 6, 12, 20)).leader is not None


def test_a_label_far_from_everything_still_needs_its_line():
    mark = Mark(100, 100, 5)
    space = LabelSpace(FRAME, [mark])
    assert space.belongs(Box(110, 95, 140, 105), mark)
    assert not space.belongs(Box(130, 95, 160, 105), mark)


def test_a_label_would_rather_not_cover_a_line():
    mark = Mark(100, 100, 5)
    space = LabelSpace(FRAME, [mark], lines=[Segment(50, 100, 250, 100)])
    box = space.place(mark, "abc", size=10, gap=3).box
    assert box.bottom <= 100 or box.top >= 100
