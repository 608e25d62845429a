# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.core.protocols import SearchSpace
from keelwright.heal.search import RESOLUTION, Tried, next_coefficient

LINEAR = SearchSpace(neutral=1.0, grid=(0.2, 0.4, 0.6, 0.8))
RESTA = SearchSpace(neutral=0.0, grid=(0.25, 0.5, 1.0))


def tried(coefficient, *, best=False, restored=False, shortfall=0.0):
    return Tried(coefficient, best, restored, shortfall)


def test_grid_comes_first_in_its_order():
    assert next_coefficient(LINEAR, []) == 0.2
    assert next_coefficient(LINEAR, [tried(0.2), tried(0.6)]) == 0.4


def test_restored_best_looks_for_a_smaller_change():
    trials = [tried(0.2), tried(0.4, best=True, restored=True), tried(0.6), tried(0.8)]
    assert next_coefficient(LINEAR, trials) == 0.5
    trials = [tried(0.25), tried(0.5, best=True, restored=True), tried(1.0)]
    assert next_coefficient(RESTA, trials) == 0.375


def test_best_that_is_not_restored_looks_for_a_larger_change():
    trials = [tried(0.2, shortfall=0.1), tried(0.4, best=True), tried(0.6), tried(0.8)]
    assert next_coefficient(LINEAR, trials) == pytest.approx(0.3)


def test_weakest_restored_trial_looks_towards_no_change_at_all():
    trials = [tried(0.2), tried(0.4), tried(0.6), tried(0.8, best=True, restored=True)]
    assert next_coefficient(LINEAR, trials) == 0.9


def test_strongest_trial_that_is_not_restored_ends_the_search():
    assert next_coefficient(RESTA, [tried(0.25), tried(0.5), tried(1.0, best=True)]) is None


def test_nothing_admissible_looks_where_the_limits_are_missed_least():
    trials = [tried(0.25, shortfall=0.2), tried(0.5, shortfall=0.1), tried(1.0, shortfall=0.9)]
    assert next_coefficient(RESTA, trials) == 0.375


def test_search_ends_at_its_resolution():
    trials = [tried(0.2), tried(0.4), tried(0.6, best=True, restored=True), tried(0.8)]
    steps = 0
    while (point := next_coefficient(LINEAR, trials)) is not None:
        trials.append(tried(point))
        steps += 1
        assert steps < 10
    gaps = [abs(one.coefficient - 0.6) for one in trials if one.coefficient > 0.6]
    assert min(gaps) < 2 * RESOLUTION


SWAP = SearchSpace(neutral=1.0, grid=(1e-5, 1e-4, 1e-3, 1e-2), setting="t")


def test_a_grid_over_orders_of_magnitude_is_narrowed_down_by_ratios():
    trials = [tried(1e-5), tried(1e-4), tried(1e-3, best=True, restored=True), tried(1e-2)]
    assert next_coefficient(SWAP, trials) == pytest.approx(3.16e-3)
    steps = 0
    while (point := next_coefficient(SWAP, trials)) is not None:
        trials.append(tried(point))
        steps += 1
        assert steps < 20
    assert min(one.coefficient for one in trials if one.coefficient > 1e-3) < 1.2e-3


def test_a_value_that_failed_is_not_tried_again():
    assert next_coefficient(LINEAR, [tried(0.4)], out={0.2}) == 0.6
    trials = [tried(0.2), tried(0.4, best=True, restored=True), tried(0.6), tried(0.8)]
    assert next_coefficient(LINEAR, trials, out={0.5}) is None
