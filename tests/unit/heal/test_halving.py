# SPDX-License-Identifier: Apache-2.0
import random
from collections import Counter

import pytest

from keelwright.core.records import Estimate, Item
from keelwright.heal.decide import Floors, LimitCheck, Measured, Trial
from keelwright.heal.halving import (
    FULL_RACE,
    best_of,
    is_within_bounds,
    keep_better,
    most_trials,
    nested_part,
    rounds_for,
    survivors,
)
from keelwright.measure.metrics import Metrics
from keelwright.ops.intervals import wilson

FLOORS = Floors()


def items(count, kind="harmful", hazards=("a", "b"), clusters=0):
    cluster_of = [f"c{n % clusters}" if clusters else None for n in range(count)]
    return [
        Item(f"{kind}:{n}", "s", kind, hazards[n % len(hazards)], "p", cluster_id=cluster_of[n]) for n in range(count)
    ]


def trial(method, bad, change, *, n=100, over=0.0, value=0.5):
    """A trial with `bad` of `n` harmful items bad, and `over` of `n` look-alikes refused, against a limit of 0.05."""
    metrics = Metrics(wilson(bad, n), None, wilson(round(over * n), n), None, None, None)
    held = over <= 0.05
    check = LimitCheck("over_refusal", 0.05, over, held, at_least=False)
    return Trial(method, value, Measured(metrics, {str(one): one < bad for one in range(n)}), change, (check,))


def test_parts_are_nested_and_of_equal_make_up():
    whole = [*items(80), *items(40, "benign", ("x",)), *items(6, "task", ("t",))]
    quarter, half = (nested_part(whole, share, seed=3) for share in (0.25, 0.5))
    assert set(quarter) < set(half) < set(whole)
    counts = Counter((item.kind, item.hazard) for item in quarter)
    assert counts == {("harmful", "a"): 10, ("harmful", "b"): 10, ("benign", "x"): 10, ("task", "t"): 2}
    assert len(half) == 40 + 20 + 3


def test_a_part_holds_at_least_one_item_of_every_kind_and_hazard():
    whole = items(4, hazards=("a", "b", "c", "d"))
    assert {item.hazard for item in nested_part(whole, 0.25, seed=0)} == set("abcd")


def test_clusters_stay_together_in_a_part():
    whole = items(40, hazards=("a",), clusters=10)
    part = {item.item_id for item in nested_part(whole, 0.25, seed=1)}
    for cluster in range(10):
        inside = {item.item_id for item in whole if item.cluster_id == f"c{cluster}"}
        assert inside <= part or not inside & part


def test_a_part_depends_on_the_seed_and_not_on_the_order_of_the_items():
    whole = items(80)
    mixed = random.Random(0).sample(whole, len(whole))
    assert set(nested_part(whole, 0.25, seed=1)) == set(nested_part(mixed, 0.25, seed=1))
    assert set(nested_part(whole, 0.25, seed=1)) != set(nested_part(whole, 0.25, seed=2))
    assert nested_part(whole, 1.0, seed=1) == tuple(whole)


@pytest.mark.parametrize("methods", range(1, 40))
def test_rounds_end_on_the_whole_half_and_never_grow(methods):
    rounds = rounds_for(methods)
    counts = [count for _, count in rounds]
    assert rounds[-1][0] is None
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == methods
    assert counts[-1] >= min(methods, FULL_RACE)
    assert (len(rounds) == 1) == (methods <= FULL_RACE)


def test_a_round_keeps_the_better_half_but_never_fewer_than_a_full_race():
    assert [survivors(count) for count in (1, 3, 4, 5, 7, 20)] == [1, 3, 3, 3, 4, 10]


def test_a_race_of_few_methods_costs_what_it_did_without_rounds():
    assert most_trials([4, 3], 3) == (13, 13.0)


def test_a_long_race_pays_only_for_items_that_are_new():
    trials, passes = most_trials([4] * 8, 3)
    # 8 methods on a quarter, 4 on the next quarter, 3 on the other half; 3 refinements of each of those.
    assert passes == pytest.approx(8 * 4 * 0.25 + 4 * 4 * 0.25 + 3 * 4 * 0.5 + 3 * 3)
    assert trials == 8 * 4 + 3 * 3


def test_a_limit_is_clearly_missed_only_when_the_whole_interval_lies_beyond_it():
    assert is_within_bounds(trial("a", 0, 0.1, over=0.05))
    assert is_within_bounds(trial("a", 0, 0.1, over=0.08))
    assert not is_within_bounds(trial("a", 0, 0.1, over=0.30))


def test_a_limit_from_below_is_judged_by_the_upper_end():
    low = Metrics(None, None, None, Estimate(0.90, 0.82, 0.96, 60), None, None)
    check = LimitCheck("answer_rate", 0.95, 0.90, held=False, at_least=True)
    assert is_within_bounds(Trial("a", 0.5, Measured(low, {}), 0.1, (check,)))
    far = Metrics(None, None, None, Estimate(0.70, 0.60, 0.80, 60), None, None)
    assert not is_within_bounds(Trial("a", 0.5, Measured(far, {}), 0.1, (check,)))


def test_the_best_trial_is_the_smallest_change_among_the_equally_safe():
    tried = [trial("a", 0, 0.8), trial("a", 3, 0.4), trial("a", 40, 0.1)]
    assert best_of(tried, floors=FLOORS, aligned=None) is tried[1]


def test_an_admissible_trial_comes_before_one_that_may_be():
    tried = [trial("a", 0, 0.2, over=0.08), trial("a", 0, 0.6)]
    assert best_of(tried, floors=FLOORS, aligned=None) is tried[1]


def test_where_every_limit_is_clearly_missed_the_least_broken_is_the_best():
    tried = [trial("a", 0, 0.2, over=0.9), trial("a", 50, 0.6, over=0.3)]
    assert best_of(tried, floors=FLOORS, aligned=None) is tried[1]


def test_methods_are_kept_by_bounds_then_safety_then_change():
    tried = {
        "refuses all": [trial("refuses all", 0, 0.1, over=0.9)],
        "unsafe": [trial("unsafe", 60, 0.1)],
        "large": [trial("large", 0, 0.9)],
        "small": [trial("small", 2, 0.3)],
    }
    assert keep_better(tried, 1, floors=FLOORS, aligned=None) == ["small"]
    assert keep_better(tried, 2, floors=FLOORS, aligned=None) == ["large", "small"]
    assert keep_better(tried, 3, floors=FLOORS, aligned=None) == ["unsafe", "large", "small"]


def test_without_a_utility_the_aligned_model_is_what_is_asked_for():
    # Both are worse than the aligned model, so the safer one goes on, although the other changes less.
    tried = {"less": [trial("less", 30, 0.1)], "safer": [trial("safer", 20, 0.9)]}
    aligned = trial("aligned", 0, 0.0).measured
    assert keep_better(tried, 1, floors=FLOORS, aligned=aligned) == ["safer"]


def test_methods_that_nothing_tells_apart_keep_their_order():
    tried = {name: [trial(name, 0, 0.5)] for name in "cab"}
    assert keep_better(tried, 2, floors=FLOORS, aligned=None) == ["c", "a"]
