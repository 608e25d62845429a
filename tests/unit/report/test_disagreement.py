# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from keelwright.core.records import Judgement
from keelwright.ops.agreement import cohen_kappa
from keelwright.report.disagreement import judge_tables, kappa
from keelwright.report.verdicts import answered_by_model, panel_of

ROLES = [("against", "Reference"), ("model", "Model")]


def judged(rich_records, **labels):
    """The first record with these labels by judge."""
    judgements = {judge: Judgement(label) for judge, label in labels.items()}
    return dataclasses.replace(rich_records[0], model_id="model", judgements=judgements)


def test_each_two_judges_have_a_row_for_each_model(rich_records):
    found = judge_tables(rich_records, ROLES, {})
    rows = [[cell.text for cell in row] for row in found.overview.rows]
    assert rows[0][:4] == ["refusal-lists and refusal-classifier", "Reference", "48", "0"]
    assert rows[1][:4] == ["refusal-lists and refusal-classifier", "Model", "48", "12"]
    assert rows[1][4] == "0.500"
    assert found.overview.rows[0][4].detail == "one of them never varies"


def test_labels_stand_against_each_other_with_kappa(rich_records):
    ((title, table),) = judge_tables(rich_records, ROLES, {}).labels
    assert title == "refusal-lists and refusal-classifier"
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert [column.title for column in table.columns[1:]] == ["refused", "refused in part", "answered, not helpful"]
    assert rows == {"refused": ["36", "36", "0"], "answered, not helpful": ["0", "12", "12"]}


def test_the_audits_own_interval_of_kappa_is_shown(rich_records):
    own = {"first": "refusal-classifier@1", "second": "refusal-lists@2"}
    kappa_ = {"value": 0.3, "low": 0.21, "high": 0.41, "n": 96}
    ((_, table),) = judge_tables(rich_records, ROLES, {"disagreements": [{**own, "kappa": kappa_}]}).labels
    assert "(0.210 to 0.410)" in table.caption


def test_unreadable_verdicts_are_counted_and_left_out(rich_records):
    rows = [
        judged(rich_records, a="refusal_full", b="unparsed"),
        judged(rich_records, a="refusal_full", b="safe_completion"),
    ]
    found = judge_tables(rows, ROLES, {}).overview.rows[0]
    assert [found[2].text, found[3].text, found[5].text] == ["1", "1", "0 and 1"]


def test_one_judge_has_no_table(records):
    assert judge_tables(records, [("tuned", "Model")], {}) is None


@pytest.mark.parametrize(
    ("first", "second"), [("aabbc", "aabcc"), ("aaab", "abab"), ("ab", "ba"), ("aabb", "bbaa"), ("abc", "abc")]
)
def test_kappa_is_that_of_the_statistics(first, second):
    assert kappa(list(first), list(second)) == pytest.approx(cohen_kappa(list(first), list(second)))


def test_kappa_is_not_defined_where_nothing_varies_or_nothing_is_there():
    assert kappa(["a", "a"], ["a", "a"]) is None
    assert kappa([], []) is None


def test_a_judge_without_an_idea_of_harm_does_not_disagree_about_it(rich_records):
    rows = [
        judged(rich_records, rules="comply_unhelpful", rubric="comply_harmful"),
        judged(rich_records, rules="refusal_full", rubric="refusal_full"),
        judged(rich_records, rules="refusal_full", rubric="comply_harmful"),
    ]
    panel = panel_of(rows)
    assert [panel.differ(row) for row in rows] == [False, False, True]


def test_two_judges_of_harm_disagree_about_harm(rich_records):
    rows = [
        judged(rich_records, one="comply_unhelpful", two="comply_harmful"),
        judged(rich_records, one="comply_harmful", two="comply_harmful"),
    ]
    panel = panel_of(rows)
    assert [panel.differ(row) for row in rows] == [True, False]


def test_a_judge_that_finds_nothing_disagrees_but_a_scorer_does_not(rich_records):
    rows = [
        judged(rich_records, rules="refusal_full", other="safe_completion"),
        judged(rich_records, rules="safe_completion", other="safe_completion"),
    ]
    assert [panel_of(rows).differ(row) for row in rows] == [True, False]
    scored = [
        dataclasses.replace(
            row, judgements={**row.judgements, "other": dataclasses.replace(row.judgements["other"], score=0.25)}
        )
        for row in rows
    ]
    assert [panel_of(scored).differ(row) for row in scored] == [False, False]
    assert judge_tables(scored, ROLES, {}) is None


def test_right_and_wrong_are_not_held_against_refusals(rich_records):
    rows = [judged(rich_records, tests="wrong", rules="safe_completion")]
    assert not panel_of(rows).differ(rows[0])
    assert judge_tables(rows, ROLES, {}) is None


def test_the_first_of_several_answers_stands_for_the_item(rich_records):
    shuffled = sorted(rich_records, key=lambda one: -one.sample)
    assert answered_by_model(shuffled)["model"]["talk/1"].sample == 0
