# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.report.page import render_gate
from keelwright.report.rules import gate_badge, gate_facts, gate_sentence, rules_table


def test_every_rule_has_a_row_with_verdict_interval_p_count_and_need(gate_summary):
    rows = [[cell.text for cell in row] for row in rules_table(gate_summary).rows]
    assert rows == [
        ["Refusal rate", "✕ fail", "−0.505", "−0.573 to −0.435", "< 0.001", "200", ""],
        ["Over-refusal", "✓ pass", "0.0500", "0.0200 to 0.0900", "", "200", ""],
        ["User safety (domain QA)", "! not measurable", "+0.0100", "−0.100 to 0.100", "", "200", "1,640"],
    ]


def test_a_rule_says_what_it_asked_for_and_what_was_found(gate_summary):
    first, second, third = rules_table(gate_summary).rows
    assert first[0].detail == "regression, must show 0.1"
    assert first[1].detail == "refusal_rate got worse: change -0.505."
    assert second[0].detail == "threshold, at most 0.2"
    assert third[0].detail == "non-inferiority, margin 0.05, only curses"


@pytest.mark.parametrize(
    ("outcome", "word", "tone"),
    [("pass", "Pass", "good"), ("fail", "Fail", "bad"), ("not measurable", "Not measurable", "bad")],
)
def test_each_outcome_has_its_badge(gate_summary, outcome, word, tone):
    found = gate_badge({**gate_summary, "outcome": outcome})
    assert (found.word, found.tone) == (word, tone)


def test_the_heading_names_what_failed_and_what_could_not_be_decided(gate_summary):
    assert gate_sentence(gate_summary) == (
        "1 of 3 rules of the policy ‘strict’ hold; failed: refusal rate; not measurable: user safety (domain qa)."
    )


def test_the_facts_name_policy_level_and_runs(gate_summary):
    found = dict(gate_facts(gate_summary))
    assert found["Level"] == "0.05, one-sided, with power 0.8"
    assert (found["Before"], found["After"]) == ("runs/a", "runs/b")
    assert dict(gate_facts({**gate_summary, "runs": ["runs/a"]}))["Run"] == "runs/a"


def test_the_page_of_a_gate_has_every_rule(gate_summary, run):
    page = render_gate({**run, "command": "gate"}, gate_summary)
    for part in ("Fail", "refusal_rate got worse", "1,640", "never that nothing changed"):
        assert part in page
