# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.core.records import Estimate
from keelwright.report.reading import read_estimate, read_metrics, read_summary, unit_of_utility


def test_an_estimate_reads_back_and_null_stays_unmeasured():
    value = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 12}
    assert read_estimate(value) == Estimate(0.5, 0.25, 0.75, 12)
    assert read_estimate(None) is None
    assert read_metrics(None) is None
    assert read_metrics({"harm_rate": value})["utility"] is None


def test_the_chosen_trial_and_the_front_are_marked(summary_for):
    summary = summary_for()
    reading = read_summary(summary)
    assert reading.chosen.name == "linear 0.4"
    assert [trial.index for trial in reading.trials if trial.is_on_front] == summary["pareto"]


@pytest.mark.parametrize(
    ("verdict", "written", "title", "roles"),
    [
        ("repaired", True, "Repaired", 3),
        ("repair_not_verified", False, "Candidate", 3),
        ("no_admissible_repair", False, "Repaired", 2),
        ("no_evidence_of_loss", False, "Repaired", 2),
    ],
)
def test_only_a_verified_repair_is_called_repaired(summary_for, verdict, written, title, roles):
    reading = read_summary(summary_for(verdict))
    assert reading.is_written is written
    assert reading.role_title("repaired") == title
    assert len(reading.roles) == roles


def test_the_best_trade_off_is_the_trial_whose_limits_are_listed(summary_for):
    reading = read_summary(summary_for("no_admissible_repair"))
    assert reading.chosen is None
    assert reading.best_trade_off().name == "linear 0.3"
    assert read_summary(summary_for("no_evidence_of_loss")).best_trade_off() is None


def test_only_a_perplexity_is_a_ratio(summary_for):
    assert unit_of_utility(summary_for()) == "rate"
    assert unit_of_utility({"utility": {"scorer": "perplexity"}}) == "number"
    assert unit_of_utility({"utility": None}) == "rate"
