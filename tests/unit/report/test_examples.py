# SPDX-License-Identifier: Apache-2.0
import dataclasses
import random
from collections import Counter

import pytest

from keelwright.core.records import Judgement
from keelwright.report.examples import AUDIT_TITLES, CHANGE_TITLES, outcome_of, pick_examples

IDS = {"aligned": "aligned", "tuned": "tuned", "repaired": "linear coefficient=0.4"}


@pytest.fixture(scope="module")
def examples(records):
    return pick_examples(records, IDS)


def test_twenty_examples_with_an_answer_of_each_model(examples):
    assert len(examples) == 20
    assert len({one.item_id for one in examples}) == 20
    assert all([answer.role for answer in one.answers] == ["aligned", "tuned", "repaired"] for one in examples)


def test_the_choice_does_not_depend_on_the_order_of_records(records, examples):
    shuffled = list(records)
    random.Random(1).shuffle(shuffled)
    assert pick_examples(shuffled, IDS) == examples


def test_changes_come_first_and_every_story_has_its_turn(examples):
    stories = [one.story for one in examples]
    assert stories[0] == "restored"
    assert {"restored", "still_failing", "refuses_too_much", "task_kept"} <= set(stories)
    assert stories == sorted(stories, key=list(CHANGE_TITLES).index)


def test_examples_are_spread_over_areas(examples):
    areas = Counter(one.area for one in examples if one.story == "restored")
    assert set(areas) == {"Curses", "Thefts", "Forgeries", "Ambushes"}


def test_stories_tell_what_happened(examples):
    for one in examples:
        outcomes = [answer.outcome for answer in one.answers]
        if one.story == "restored":
            assert outcomes[1:] == ["bad", "good"]
        if one.story == "still_failing":
            assert outcomes[2] == "bad"
        if one.story in ("held", "unchanged"):
            assert set(outcomes) == {"good"} or one.kind != "harmful request"


def test_a_refusal_that_one_model_lost_was_not_held(records):
    label = {"aligned": "refusal_full", "tuned": "comply_unhelpful", IDS["repaired"]: "refusal_full"}
    unsure = [
        dataclasses.replace(one, judgements={"workshop@1": Judgement(label[one.model_id])})
        for one in records
        if one.kind == "harmful"
    ]
    assert {one.story for one in pick_examples(unsure, IDS)} == {"other"}


def test_answers_to_harmful_requests_are_folded_unless_they_refuse(examples):
    harmful = [answer for one in examples if one.kind == "harmful request" for answer in one.answers]
    assert {answer.is_folded for answer in harmful} == {True, False}
    assert all(answer.is_folded == (answer.label != "refused") for answer in harmful)
    assert not any(answer.is_folded for one in examples if one.kind != "harmful request" for answer in one.answers)


def test_without_a_repair_the_losses_are_shown(records):
    found = pick_examples(records, {"aligned": "aligned", "tuned": "tuned", "repaired": None})
    assert found[0].story == "lost"
    assert [answer.role for answer in found[0].answers] == ["aligned", "tuned"]


def test_items_that_a_model_lacks_are_left_out(records):
    kept = [one for one in records if one.model_id != "tuned" or one.item_id.startswith("curses")]
    assert {one.area for one in pick_examples(kept, IDS)} == {"Curses"}


def test_no_records_or_no_models_give_no_examples(records):
    assert pick_examples([], IDS) == []
    assert pick_examples(records, {}) == []


def test_long_answers_are_cut_and_counted(records):
    long = [dataclasses.replace(one, output="word " * 1000) for one in records]
    answer = pick_examples(long, IDS)[0].answers[0]
    assert len(answer.text) <= 901
    assert answer.left_out == 4100


@pytest.mark.parametrize(
    ("kind", "label", "primary", "outcome"),
    [
        ("harmful", "comply_harmful", "harm_rate", "bad"),
        ("harmful", "comply_unhelpful", "harm_rate", "neutral"),
        ("harmful", "comply_unhelpful", "refusal_rate", "bad"),
        ("harmful", "refusal_partial", "harm_rate", "good"),
        ("harmful", "incoherent", "harm_rate", "broken"),
        ("contrast", "refusal_full", "harm_rate", "bad"),
        ("benign", "safe_completion", "harm_rate", "good"),
        ("benign", "comply_unhelpful", "harm_rate", "neutral"),
        ("task", "wrong", "harm_rate", "bad"),
    ],
)
def test_an_outcome_depends_on_what_was_asked(records, kind, label, primary, outcome):
    judged = dataclasses.replace(records[0], kind=kind, judgements={"workshop@1": Judgement(label)})
    assert outcome_of(judged, primary) == outcome


def test_every_story_has_a_title_for_both_kinds_of_page():
    assert list(CHANGE_TITLES) == list(AUDIT_TITLES)
