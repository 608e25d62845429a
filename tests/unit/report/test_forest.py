# SPDX-License-Identifier: Apache-2.0
import itertools
import re

import pytest

from keelwright.core.records import Estimate
from keelwright.report.forest import ForestAxis, ForestPoint, ForestRow, draw_forest, not_measured, q_words

AXIS = ForestAxis("rate", "Refusal rate, higher is better")


def row(name, *values):
    points = (
        ForestPoint("role-model", "circle", False, Estimate(one, one - 0.05, one + 0.05, 8), f"{one:.0%}", f"tip {one}")
        for one in values
    )
    return ForestRow(name, tuple(points))


def drawn(rows, axis=AXIS, width=720.0):
    return draw_forest(rows, axis, name="f", title="t", description="d", width=width)


@pytest.mark.parametrize("width", [720.0, 330.0])
def test_forty_areas_have_a_row_each_that_does_not_touch_the_next(width):
    found = drawn([row(f"area {index}", 0.4, 0.6) for index in range(40)], width=width)
    marks = [float(one) for one in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', found)]
    assert len(marks) == 80
    assert all(later - earlier >= 12 for earlier, later in itertools.pairwise(marks))
    height = float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', found).group(1))
    assert max(marks) < height
    assert found.count('class="row-name"') == 40


def test_a_rate_has_the_whole_scale_and_a_change_its_zero():
    assert [">0%<" in drawn([row("a", 0.1)]), ">100%<" in drawn([row("a", 0.1)])] == [True, True]
    change = drawn([row("a", -0.2)], ForestAxis("points", "Change", zero=0.0))
    assert 'class="zero"' in change
    assert "−20" in change
    assert "%" not in re.sub(r"20%|-20%", "", change)


def test_points_never_go_beyond_what_a_difference_of_rates_can_be():
    found = drawn([row("a", -0.9, 0.9)], ForestAxis("points", "Change", zero=0.0))
    ticks = [int(one.replace("−", "-").replace("+", "")) for one in re.findall(r'"middle">([−+]?\d+)<', found)]
    assert ticks
    assert min(ticks) >= -100
    assert max(ticks) <= 100


def test_a_long_name_is_cut_and_whole_in_its_tooltip():
    name = "an area whose name is far too long for the room that a row of a forest plot can give it"
    found = drawn([row(name, 0.5)])
    assert f"<title>{name}</title>" in found
    assert f">{name}</text>" not in found
    assert "…</text>" in found


def test_names_and_tips_are_escaped():
    found = drawn([row("<b>", 0.5)])
    assert "<b>" not in found
    assert "&lt;b&gt;" in found


def test_what_was_not_measured_has_a_lane_without_a_mark():
    found = drawn([ForestRow("a", (not_measured("role-against", "circle"),)), row("b", 0.5)])
    assert "not measured" in found
    assert found.count("<circle") == 1


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0.0001, "q < 0.001"), (0.0421, "q = 0.042"), (1.2, "q = 1.0")]
)
def test_a_false_discovery_rate_is_short(value, text):
    assert q_words(value) == text
