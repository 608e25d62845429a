# SPDX-License-Identifier: Apache-2.0
from keelwright.core.errors import NumericalError
from keelwright.core.records import Estimate
from keelwright.heal.decide import Floors, Measured, PairedTest, Trial
from keelwright.heal.outcome import Outcome
from keelwright.heal.standings import dominated_by, front_of, race_rows
from keelwright.heal.trials import Failure, Race
from keelwright.measure.metrics import Metrics

LOSS = PairedTest(worse=60, better=0, n=100, p_value=1e-12)


def trial(method, bad, utility, *, value=0.5, change=0.1, part="selection", n=10):
    metrics = Metrics(
        Estimate(bad / n, 0, 1, n), *[None] * 4, None if utility is None else Estimate(utility, 0, 1, 10)
    )  # fmt: skip
    return Trial(method, value, Measured(metrics, {str(one): one < bad for one in range(n)}), change, (), "t", part, n)


def test_there_is_one_front_over_all_methods():
    trials = [trial("a", 5, 0.9), trial("b", 2, 0.8), trial("b", 2, 0.7), trial("c", 0, 0.5), trial("c", 6, 0.9)]
    assert front_of(trials) == [0, 1, 3]
    assert dominated_by(trials) == [None, None, 1, None, 0]


def test_equal_trials_share_the_front():
    trials = [trial("a", 1, 0.9), trial("b", 1, 0.9)]
    assert front_of(trials) == [0, 1]
    assert dominated_by(trials) == [None, None]


def test_trials_on_a_part_of_the_items_are_compared_with_none():
    trials = [trial("a", 5, 0.9), trial("b", 0, 1.0, part="quarter")]
    assert front_of(trials) == [0]
    assert dominated_by(trials) == [None, None]


def test_without_a_utility_the_smaller_change_takes_its_place():
    trials = [trial("a", 5, None, change=0.1), trial("b", 5, None, change=0.2), trial("c", 1, None, change=0.3)]
    assert front_of(trials) == [0, 2]


def test_every_dominated_trial_names_one_of_the_front():
    trials = [trial("m", bad, utility / 10) for bad in range(5) for utility in range(3, 10)]
    front = front_of(trials)
    for index, by in enumerate(dominated_by(trials)):
        assert (by is None) == (index in front)
        assert by is None or by in front


def test_the_race_says_what_became_of_every_method():
    error = NumericalError("The tensor 'w' overflows.", expected="e", found="inf", fix="f")
    trials = [trial("a", 1, 0.9), trial("b", 3, 0.8, part="half", n=6), trial("c", 4, 0.9, value=0.2)]
    race = Race(trials, [Failure("d", None, error), Failure("c", 0.4, error), Failure("c", 0.6, error)], {"b": "half"})
    outcome = Outcome("repaired", LOSS, 0.05, tuple(trials), trials[0], race=race)
    rows = race_rows(outcome, ["a", "b", "c", "d"], {"e": "needs x"}, floors=Floors(), aligned=None)
    assert [(row["method"], row["ended"], row["round"], row["items"], row["best"]) for row in rows] == [
        ("a", "chosen", "selection", 10, 0),
        ("b", "left_behind", "half", 6, 1),
        ("c", "finalist", "selection", 10, 2),
        ("d", "failed", None, 0, None),
        ("e", "left_out", None, 0, None),
    ]
    assert rows[2]["text"] == "at 0.4, 0.6: The tensor 'w' overflows. Found inf."
    assert rows[3]["text"] == "The tensor 'w' overflows. Found inf."
    assert rows[4]["text"] == "needs x"


def test_a_run_that_tried_nothing_had_no_race():
    assert race_rows(Outcome("no_evidence_of_loss", LOSS, 0.05), ["a"], {}, floors=Floors(), aligned=None) == []
