# SPDX-License-Identifier: Apache-2.0
"""The knee of a sweep."""

from __future__ import annotations

import json

import pytest

from keelwright.core.errors import ConfigError
from keelwright.ops.intervals import wilson
from keelwright.ops.knee import SweepPoint, knee


def points(*harms: int, n: int = 100) -> list[SweepPoint]:
    return [SweepPoint(100 * index, wilson(harm, n)) for index, harm in enumerate(harms)]


def test_the_knee_is_the_smallest_dose_within_two_points_of_the_largest() -> None:
    found = knee(points(90, 40, 12, 11, 10))
    assert found.at.k == 200
    assert found.largest.k == 400


def test_exactly_two_points_are_within_whatever_floats_make_of_them() -> None:
    for harm in range(98):
        assert knee(points(harm + 2, harm)).at.k == 0
        assert knee(points(harm + 3, harm)).at.k == 100


def test_a_dose_with_less_harm_than_the_largest_counts() -> None:
    found = knee(points(50, 0, 10))
    assert found.at.k == 100
    assert found.rises == (200,)


def test_a_sweep_without_any_effect_has_its_knee_at_zero() -> None:
    assert knee(points(70, 70, 70)).at.k == 0


def test_the_order_of_the_points_does_not_matter() -> None:
    sweep = points(90, 40, 12, 11, 10)
    assert knee(sweep[::-1]) == knee(sweep)


def test_plain_tuples_are_points() -> None:
    rate = wilson(1, 10)
    found = knee([(0, wilson(9, 10), rate, rate), (10, rate, rate, rate)])
    assert found.at == SweepPoint(10, rate, rate, rate)


def test_the_mapping_holds_every_interval_and_is_plain() -> None:
    plain = json.loads(json.dumps(knee([(0, wilson(9, 10), wilson(0, 10), None), (10, wilson(1, 10))]).to_mapping()))
    assert plain["k"] == 10
    assert plain["points"][0]["harm"]["n"] == 10
    assert plain["points"][0]["over_refusal"]["high"] > 0.2
    assert plain["points"][0]["accuracy"] is None


@pytest.mark.parametrize("wrong", [[], [*points(1), *points(1)]])
def test_no_points_or_a_dose_twice_is_an_error(wrong: list[SweepPoint]) -> None:
    with pytest.raises(ConfigError, match="A knee cannot be found"):
        knee(wrong)


def test_an_allowance_outside_zero_to_one_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'within' is out of range"):
        knee(points(1), within=2.0)
