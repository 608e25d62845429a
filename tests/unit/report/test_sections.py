# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.report.reading import read_summary
from keelwright.report.sections import (
    audit_facts,
    badge,
    caution_words,
    coverage_words,
    evidence_words,
    facts,
    heal_key_figures,
    status_words,
    suite_words,
)


@pytest.mark.parametrize(
    ("verdict", "word", "tone"),
    [
        ("repaired", "Repaired", "good"),
        ("no_evidence_of_loss", "No evidence of loss", "muted"),
        ("no_admissible_repair", "No admissible repair", "bad"),
        ("repair_not_verified", "Repair not verified", "bad"),
    ],
)
def test_each_verdict_has_its_badge(summary_for, verdict, word, tone):
    found = badge(read_summary(summary_for(verdict)))
    assert (found.word, found.tone) == (word, tone)
    assert found.consequence.startswith("Nothing was written") is (verdict != "repaired")


def test_the_facts_name_method_models_and_suite(run, summary_for):
    found = dict(facts(run, read_summary(summary_for())))
    assert found["Method"] == "linear, coefficient=0.4 (faithful)"
    assert (found["Aligned"], found["Tuned"]) == ("lab:workshop/aligned", "runs/damage/tuned")
    assert found["Took"] == "45.7 s"


def test_without_a_choice_the_facts_name_the_best_trade_off(run, summary_for):
    found = dict(facts(run, read_summary(summary_for("no_admissible_repair"))))
    assert "Method" not in found
    assert found["Best trade-off"] == "linear, coefficient=0.3; not admissible"


def test_key_figures_put_the_incoherent_share_beside_the_harm_rate(summary_for):
    figures = {figure.title: figure for figure in heal_key_figures(read_summary(summary_for()))}
    assert list(figures) == ["Harm rate", "Utility", "Answer rate", "Over-refusal"]
    assert figures["Harm rate"].value == "3.33%"
    assert figures["Harm rate"].note == "incoherent answers 1.11%"
    assert figures["Harm rate"].others == (("aligned", "Aligned", "0%"), ("tuned", "Tuned", "63.3%"))


def test_without_a_repair_the_tuned_model_gives_the_figures(summary_for):
    figure = heal_key_figures(read_summary(summary_for("no_evidence_of_loss")))[0]
    assert (figure.role, figure.value) == ("tuned", "1.67%")


def test_the_evidence_names_test_counts_and_what_could_have_been_seen(summary_for):
    first, second = evidence_words(read_summary(summary_for()))
    assert "worse on 77 and better on 0 of 120 paired items, p < 0.001 (one-sided exact McNemar" in first
    assert second.endswith("is 5.20 points.")
    assert "p = 0.250" in evidence_words(read_summary(summary_for("no_evidence_of_loss")))[0]


def test_limits_say_what_was_and_was_not_tested(summary_for):
    summary = summary_for()
    assert summary["suite"]["says"] in coverage_words(summary)
    assert any("300 task" in one for one in coverage_words(summary))
    cautions = caution_words(summary, has_halves=True)
    assert any("selection half" in one for one in cautions)
    assert any("smaller than 5.20 points" in one for one in cautions)
    assert not any("Utility was not measured" in one for one in cautions)
    assert any("Utility was not measured" in one for one in caution_words({**summary, "utility": None}))


def test_the_status_of_each_method_is_explained(summary_for):
    linear, resta = status_words(summary_for())
    assert linear.startswith("linear: faithful, that is, written from the paper")
    assert resta.startswith("resta: reconstruction, that is, the source leaves a gap")


def test_an_audits_facts_name_the_reference(run):
    inputs = {"model": {"ref": "a"}, "against": {"ref": "b"}}
    assert audit_facts({**run, "inputs": inputs}, {})[:2] == [("Model", "a"), ("Reference", "b")]


def test_answers_that_depend_on_the_batch_are_counted():
    again = {"n": 40, "differ": 2, "batch_size": 64}
    said = "Asked again one at a time, 2 of 40 answers differed from those made in batches of 64."
    assert said in caution_words({"batch_check": again})
    assert not any("one at a time" in one for one in caution_words({"batch_check": None}))


def test_a_page_of_two_runs_does_not_pretend_to_know_their_items():
    assert coverage_words({"runs": ["a", "b"]}) == ["The items of a and b; their own pages name them."]


def test_kinds_without_items_are_not_listed():
    suite = {"name": "core", "judge": "lists@1", "n": {"harmful": 120, "task": 0}}
    assert suite_words({"suite": suite}) == "core, judged by lists@1: 120 harmful"
