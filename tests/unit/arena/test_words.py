# SPDX-License-Identifier: Apache-2.0
"""Sentences of runs that train and measure."""

from keelwright.arena.words import screened, stress_sentence, tune_sentence


def rate(value: float | None, n: int = 50) -> dict | None:
    return None if value is None else {"value": value, "low": 0.1, "high": 0.9, "n": n}


def row(arm: str, stress: str, harm: float, seed: int = 0) -> dict:
    metrics = {"harm_rate": rate(harm), "answer_rate": rate(1.0), "utility": rate(0.5), "refusal_rate": rate(0.0)}
    return {"arm": arm, "stress": stress, "seed": seed, "metrics": metrics}


def test_a_stress_is_told_with_its_answers_its_defences_and_its_control():
    rows = [row("start", "poison", 0.0), row("undefended", "poison", 0.9), row("booster", "poison", 0.1)]
    rows.append(row("positive control", "known to break", 1.0))
    said = stress_sentence({"rows": rows, "primary": "harm_rate"})
    assert said == (
        "poison: harm from 0% to 90.0%, 100% of ordinary requests answered; with booster 10.0%. Positive control: 100%."
    )


def test_several_seeds_are_told_by_their_mean():
    rows = [row("start", "poison", 0.0), row("undefended", "poison", 0.4), row("undefended", "poison", 0.8, seed=1)]
    assert "from 0% to 60.0%" in stress_sentence({"rows": rows, "primary": "harm_rate"})
    assert "Positive control: not measured." in stress_sentence({"rows": rows, "primary": "harm_rate"})


def test_a_failed_gate_names_its_rules():
    rows = [row("start", "tuning", 0.0), row("tuned", "tuning", 0.5)]
    rules = [{"metric": "harm_rate", "outcome": "fail"}, {"metric": "utility", "outcome": "pass"}]
    summary = {"rows": rows, "primary": "harm_rate", "model": "m", "method": "plain tuning"}
    said = tune_sentence({**summary, "gate": {"outcome": "fail", "rules": rules}})
    assert said.endswith("The gate fails: harm rate.")
    assert "harm from 0% to 50.0%" in said


def test_what_a_guard_let_through_is_told_with_its_interval():
    report = {"screen": "guard", "leakage": rate(0.5), "false_positives": rate(0.0), "similarity": 0.9}
    assert screened("cell", report) == (
        "cell: 'guard' let 50.0% of 50 harmful rows through [10.0%, 90.0%]; it flagged 0% of the benign rows; "
        "gradients 0.90 like those of harmful rows."
    )
    assert "not defined" in screened("cell", {**report, "leakage": None})
