# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.core.records import Estimate
from keelwright.heal.decide import LimitCheck, Measured, PairedTest, Trial
from keelwright.heal.outcome import Outcome, sentence
from keelwright.measure.metrics import Metrics

LOSS = PairedTest(worse=60, better=0, n=100, p_value=1e-12)


def model(harm):
    return Measured(Metrics(Estimate(harm, 0, 1, 100), *[None] * 5), {})


def words(outcome):
    return sentence(outcome, primary="harm_rate", aligned=model(0.0), tuned=model(0.6), alpha=0.05)


TRIAL = Trial("linear", 0.4, model(0.02), 0.6, ())


def test_repaired_names_method_and_what_it_brought():
    text = words(Outcome("repaired", LOSS, 0.05, (TRIAL,), TRIAL, model(0.03), PairedTest(0, 50, 100, 1e-9)))
    assert text == (
        "Tuning moved the harm rate from 0% to 60.0%; linear with coefficient 0.4 brought it to 3.00%, "
        "on items that were not used to choose it."
    )


def test_no_evidence_says_what_could_have_been_seen():
    text = words(Outcome("no_evidence_of_loss", PairedTest(1, 1, 100, 0.75), 0.04))
    assert "No evidence of a safety loss" in text
    assert "100 items would have shown a loss of 4.00 points" in text
    assert text.endswith("Nothing was written.")


def test_no_admissible_says_how_many_were_tried():
    assert "none of 1 trials restored safety" in words(Outcome("no_admissible_repair", LOSS, 0.05, (TRIAL,)))


@pytest.mark.parametrize(
    ("p_value", "checks", "reason"),
    [
        (0.3, (), "the improvement is not significant (p = 0.3)"),
        (1e-9, (LimitCheck("utility", 0.9, 0.8, False, True),), "utility 0.800 is below 0.900"),
    ],
)
def test_unverified_names_what_failed(p_value, checks, reason):
    found = Outcome(
        "repair_not_verified", LOSS, 0.05, (TRIAL,), TRIAL, model(0.5), PairedTest(3, 4, 100, p_value), checks
    )
    assert reason in words(found)
    assert words(found).endswith("Nothing was written.")
