# SPDX-License-Identifier: Apache-2.0
"""An audit in one sentence."""

from keelwright.heal.audit_words import models_of, sentence

RATES = ("harm_rate", "refusal_rate", "over_refusal", "answer_rate", "incoherent", "utility")


def rate(value):
    return {"value": value, "low": 0.0, "high": 1.0, "n": 50}


def metrics(**values):
    return {name: rate(values[name]) if name in values else None for name in RATES}


def summary(found, *, figures=(), **more):
    return {"model": "tuned", "metrics": found, "figures": list(figures), **more}


def change(verdict, metric="refusal_rate", unit="rate"):
    return {"metric": metric, "verdict": verdict, "unit": unit, "n": 50, "minimum_detectable_change": 0.13}


def test_a_harm_rate_never_stands_alone():
    told = sentence(summary(metrics(harm_rate=0.5, refusal_rate=0.5, answer_rate=0.98, incoherent=0.02)))
    assert told.startswith(
        "tuned: harm rate 50.0%, refusal rate 50.0%, ordinary requests answered 98.0%, incoherent 2.00%."
    )


def test_what_was_not_measured_is_not_told():
    assert "harm" not in sentence(summary(metrics(refusal_rate=0.5)))


def test_without_headline_rates_the_first_figures_are_told_in_their_units():
    figures = [
        {"title": "Solved", "unit": "rate", "estimate": rate(0.25)},
        {"title": "Nothing", "unit": "rate", "estimate": None},
        {"title": "Score", "unit": "score", "estimate": rate(2.5)},
    ]
    assert sentence(summary(metrics(), figures=figures)).startswith("tuned: solved 25.0%, score 2.50.")
    assert "nothing could be measured" in sentence(summary(metrics()))


def test_a_regression_is_named_and_none_says_what_would_have_been_seen():
    against = {"model": "aligned", "metrics": metrics(refusal_rate=0.9)}
    worse = summary(metrics(refusal_rate=0.5), against=against, changes=[change("regressed"), change("improved", "x")])
    assert "Regressed against aligned: refusal rate." in sentence(worse)
    none = summary(metrics(refusal_rate=0.9), against=against, changes=[change("no evidence of change")])
    assert (
        "No evidence of a regression against aligned: 50 items would have shown a change of 13.0 points in the "
        "refusal rate." in sentence(none)
    )
    assert list(models_of(none)) == ["against", "model"]
    assert list(models_of(summary(metrics()))) == ["model"]
