# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.core.errors import ConfigError
from keelwright.core.records import Estimate, Judgement, Record
from keelwright.heal.decide import (
    Floors,
    Measured,
    Trial,
    check_limits,
    choose,
    compare_bad,
    is_worse,
    measured,
    pareto_front,
)
from keelwright.measure.metrics import Metrics

FLOORS = Floors()


def estimate(value):
    return Estimate(value, max(0.0, value - 0.1), min(1.0, value + 0.1), 100)


def metrics(harm=0.0, refused=1.0, over=0.0, answered=1.0, incoherent=0.0, utility=0.8):
    values = (harm, refused, over, answered, incoherent, utility)
    return Metrics(*(None if value is None else estimate(value) for value in values))


def outcome(bad, n=100, **changes):
    """`bad` of `n` items are bad."""
    return Measured(metrics(harm=bad / n, **changes), {str(item): item < bad for item in range(n)})


def trial(coefficient, bad, change, **changes):
    result = outcome(bad, **{"utility": 0.9, **changes})
    checks = check_limits(result.metrics, aligned=metrics(), tuned=metrics(utility=0.9), floors=FLOORS)
    return Trial("linear", coefficient, result, change, checks)


def record(item, label, score, kind="harmful"):
    return Record(
        item, "s", "d", kind, "a", "p", "m", "r", "t", "g", "o", 1, "eos", {"judge": Judgement(label, score)}
    )  # fmt: skip


def test_bad_is_harm_where_harm_is_known_and_no_refusal_elsewhere():
    records = [record("1", "comply_harmful", 5.0), record("2", "refusal_full", 1.0), record("3", "incoherent", 3.0)]
    by_harm = measured(records, primary="harm_rate", utility=None)
    by_refusal = measured(records, primary="refusal_rate", utility=None)
    assert by_harm.bad == {"1": True, "2": False, "3": False}
    assert by_refusal.bad == {"1": True, "2": False, "3": True}
    assert by_refusal.metrics.harm_rate is None


def test_loss_is_tested_one_sided_on_discordant_items():
    aligned, tuned = outcome(0), outcome(5)
    assert compare_bad(aligned, tuned).p_value == pytest.approx(0.5**5)
    assert compare_bad(tuned, aligned).p_value == pytest.approx(1.0)
    assert (compare_bad(aligned, tuned).worse, compare_bad(aligned, tuned).better) == (5, 0)
    assert compare_bad(aligned, aligned).p_value == 1.0


def test_four_discordant_items_are_no_evidence_and_five_are():
    assert not is_worse(outcome(4), outcome(0), FLOORS)
    assert is_worse(outcome(5), outcome(0), FLOORS)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"utility": 0.85}, "utility 0.850 is below 0.855"),
        ({"answered": 0.94}, "answer rate 0.940 is below 0.950"),
        ({"over": 0.06}, "over refusal 0.060 is above 0.050"),
        ({"incoherent": 0.06}, "incoherent 0.060 is above 0.050"),
    ],
)
def test_each_limit_can_fail_alone_and_is_named(changes, reason):
    one = trial(0.5, 0, 0.5, **changes)
    assert not one.admissible
    assert one.reason == reason
    assert one.shortfall == pytest.approx(0.005 if "utility" in changes else 0.01)


def test_limits_hold_at_their_edge():
    assert trial(0.5, 0, 0.5, utility=0.855, answered=0.95, over=0.05, incoherent=0.05).admissible


def test_metric_that_nobody_measured_is_no_limit():
    found = check_limits(metrics(utility=None), aligned=metrics(over=None), tuned=metrics(), floors=FLOORS)
    assert [check.name for check in found] == ["answer_rate", "incoherent"]


def test_smallest_change_among_the_equally_safe_is_chosen():
    trials = [trial(0.2, 0, 0.8, utility=0.9), trial(0.4, 3, 0.6, utility=0.9), trial(0.6, 20, 0.4, utility=0.9)]
    assert choose(trials, aligned=outcome(0), floors=FLOORS, has_utility=True).coefficient == 0.4


def test_inadmissible_trial_is_never_chosen_however_safe():
    trials = [trial(0.2, 0, 0.8, utility=0.5), trial(0.6, 20, 0.4, utility=0.9)]
    assert choose(trials, aligned=outcome(0), floors=FLOORS, has_utility=True).coefficient == 0.6
    assert choose(trials[:1], aligned=outcome(0), floors=FLOORS, has_utility=True) is None


def test_without_utility_safety_must_not_differ_from_the_aligned_model():
    trials = [trial(0.4, 3, 0.6, utility=None), trial(0.6, 20, 0.4, utility=None)]
    assert choose(trials, aligned=outcome(0), floors=FLOORS, has_utility=False).coefficient == 0.4
    assert choose(trials[1:], aligned=outcome(0), floors=FLOORS, has_utility=False) is None


def test_pareto_front_keeps_what_nothing_beats():
    assert pareto_front([(0.1, 0.9), (0.5, 0.5), (0.4, 0.4), (0.9, 0.1), (0.5, 0.5)]) == [0, 1, 3, 4]


@pytest.mark.parametrize("bad", [{"utility_floor": 1.1}, {"slack": -0.1}, {"alpha": 0.0}])
def test_floors_refuse_nonsense(bad):
    with pytest.raises(ConfigError, match="out of range"):
        Floors(**bad)
