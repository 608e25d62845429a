# SPDX-License-Identifier: Apache-2.0
"""Lines over steps: where they go, what a few values and a long course look like, and that charts do not touch."""

import re

import pytest

from keelwright.report.line_chart import Chart, Series, Spot, board, draw_charts, grid, key_of


def series(name="a", xs=(0, 50, 100), values=(0.0, 0.5, 1.0), spread=0.1, class_="role-arm-1"):
    spots = [Spot(x, one, max(0.0, one - spread), min(1.0, one + spread)) for x, one in zip(xs, values, strict=True)]
    return Series(name, class_, "circle", tuple(spots))


def drawn(*lines, unit="rate", width=720.0, x_title="Steps"):
    chart = Chart("Harm rate", lines, unit, x_title)
    return str(draw_charts([(chart, board(1, width)[0])], name="c", title="t", description="d", width=width))


def points(text):
    return [[float(one) for one in pair.split()] for pair in re.search(r'd="M([^"]+)"', text).group(1).split("L")]


def test_a_line_rises_with_its_values_and_runs_to_the_right():
    first, middle, last = points(drawn(series()))
    assert first[0] < middle[0] < last[0]
    assert first[1] > middle[1] > last[1]
    assert middle[1] == pytest.approx((first[1] + last[1]) / 2)


def test_the_band_encloses_the_line():
    text = drawn(series())
    band = [[float(one) for one in pair.split(",")] for pair in re.search(r'points="([^"]+)" class="series-band', text)
            .group(1).split()]  # fmt: skip
    upper, lower = band[:3], band[:2:-1]
    for (_, high), (_, value), (_, low) in zip(upper, points(text), lower, strict=True):
        assert high <= value <= low


def test_a_single_measurement_has_a_mark_and_its_interval_but_no_line():
    text = drawn(series(xs=(100,), values=(0.5,)))
    assert "series-span" in text
    assert "series-mark" in text
    assert "series-line" not in text
    assert "series-band" not in text


def test_a_long_course_has_no_marks_and_round_steps():
    text = drawn(series(xs=range(1, 201), values=[one / 200 for one in range(1, 201)], spread=0.0), unit="number")
    assert "series-mark" not in text
    ticks = re.findall(r'text-anchor="middle">([\d,]+)<', text)
    assert ticks[0] == "0"
    assert ticks[-1] == "200"
    assert len(ticks) < 12


def test_the_last_step_is_named_and_ticks_that_would_touch_are_left_out():
    text = drawn(series(xs=(0, 95, 98, 100), values=(0.0, 0.1, 0.2, 0.3)))
    assert re.findall(r'text-anchor="middle">([\d,]+)<', text) == ["0", "100"]


def test_steps_are_those_of_the_first_line():
    text = drawn(series(), series("control", (0, 13, 40), (0.0, 0.5, 0.9)))
    assert re.findall(r'text-anchor="middle">([\d,]+)<', text) == ["0", "50", "100"]


def test_rates_are_drawn_from_0_to_100_percent_and_other_numbers_around_what_they_are():
    assert ">100%<" in drawn(series(values=(0.0, 0.01, 0.02)))
    assert "%" not in drawn(series(values=(0.9, 0.5, 0.2), spread=0.0), unit="number")


def test_each_line_has_marks_and_dashes_of_its_own_class():
    text = drawn(series(), series("b", class_="role-arm-2"))
    assert text.count('class="series role-arm-1"') == text.count('class="series role-arm-2"') == 1
    assert "role-arm-2" in str(key_of(series("b", class_="role-arm-2")))


@pytest.mark.parametrize("width", [720.0, 330.0])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("places", [board, grid])
def test_places_lie_within_the_picture_and_do_not_overlap(places, count, width):
    found = places(count, width)
    assert len(found) == count
    for index, one in enumerate(found):
        assert one.left >= 0
        assert one.right <= width
        assert not any(one.overlaps(other) for other in found[index + 1 :])


def test_texts_of_a_series_are_never_markup():
    spot = Spot(0.0, 0.5, 0.4, 0.6, "<script>")
    assert "<script>" not in drawn(Series("<b>", "role-arm-1", "circle", (spot,)))
