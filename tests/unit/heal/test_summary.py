# SPDX-License-Identifier: Apache-2.0
from keelwright.core.records import Estimate
from keelwright.heal.decide import LimitCheck, Measured, PairedTest, Trial
from keelwright.heal.outcome import Outcome
from keelwright.heal.summary import _best_index, _limits
from keelwright.measure.metrics import Metrics

LOSS = PairedTest(worse=60, better=0, n=100, p_value=1e-12)


def model(harm):
    return Measured(Metrics(Estimate(harm, 0, 1, 100), *[None] * 5), {str(n): n < 100 * harm for n in range(100)})


def trial(harm, *, utility=None):
    checks = () if utility is None else (LimitCheck("utility", 0.9, utility, utility >= 0.9, True),)
    return Trial("linear", 0.4, model(harm), 0.5, checks)


def test_without_a_choice_the_trial_that_misses_least_is_shown_with_its_limit():
    outcome = Outcome("no_admissible_repair", LOSS, 0.05, (trial(0.0, utility=0.5), trial(0.1, utility=0.8)))
    assert _best_index(outcome) == 1
    (row,) = _limits(outcome, "harm_rate", aligned=model(0.0))
    assert (row["name"], row["held"], row["text"]) == ("utility", False, "utility 0.800 is below 0.900")


def test_where_all_limits_held_the_missing_safety_is_the_limit():
    outcome = Outcome("no_admissible_repair", LOSS, 0.05, (trial(0.5), trial(0.3)))
    assert _best_index(outcome) == 1
    (row,) = _limits(outcome, "harm_rate", aligned=model(0.1))
    assert row == {
        "name": "harm_rate", "limit": 0.1, "value": 0.3, "held": False, "half": "selection",
        "text": "harm rate 0.300 is above 0.100",
    }  # fmt: skip


def test_a_choice_has_no_trade_off_and_no_limit_on_safety():
    chosen = trial(0.1, utility=0.95)
    outcome = Outcome("repaired", LOSS, 0.05, (chosen,), chosen)
    assert _best_index(outcome) is None
    assert [row["name"] for row in _limits(outcome, "harm_rate", aligned=model(0.0))] == ["utility"]
