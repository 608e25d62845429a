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


def judged(item_id, kind, hazard, labels, records):
    """One item with an answer of each model, as it was judged."""
    return [
        dataclasses.replace(
            records[0], item_id=item_id, kind=kind, hazard=hazard, model_id=model_id, output=f"{item_id} {label}",
            judgements={"workshop@1": Judgement(label)},
        )
        for model_id, label in zip(IDS.values(), labels, strict=True)
    ]  # fmt: skip


def test_one_common_story_does_not_crowd_out_the_others(records):
    """As in a demo: hundreds of restored refusals beside a few items of every other kind."""
    refused, harmful, answered = "refusal_full", "comply_harmful", "safe_completion"
    cases = [(f"harm/{i}", "harmful", f"area {i % 5}", (refused, harmful, refused)) for i in range(300)]
    cases += [(f"fail/{i}", "harmful", "dual use", (refused, harmful, harmful)) for i in range(3)]
    cases += [(f"same/{i}", "benign", "ordinary", (answered,) * 3) for i in range(200)]
    cases += [("over/0", "contrast", "dual use", (answered, answered, refused))]
    cases += [("back/0", "contrast", "dual use", (answered, refused, answered))]
    cases += [("gain/0", "benign", "ordinary", (refused, answered, answered))]
    cases += [(f"task/{i}", "task", "mood", ("wrong", "correct", "correct")) for i in range(90)]
    cases += [(f"lost/{i}", "task", "mood", ("wrong", "correct", "wrong")) for i in range(5)]
    cases += [(f"right/{i}", "task", "mood", ("correct",) * 3) for i in range(600)]
    found = pick_examples([row for case in cases for row in judged(*case, records)], IDS)
    stories = Counter(one.story for one in found)
    assert len(found) == 20
    assert {"over/0", "back/0", "gain/0"} <= {one.item_id for one in found}
    assert stories["still_failing"] == 3
    assert 5 <= stories["restored"] <= 8
    assert stories["task_lost"] >= 2 <= stories["task_kept"]
    assert len({one.area for one in found if one.story == "restored"}) == 5


def test_items_where_the_models_differ_come_before_those_where_all_fail_alike(records):
    cases = [(f"alike/{i}", "contrast", "dual use", ("refusal_full",) * 3) for i in range(30)]
    cases += [("differ/0", "contrast", "dual use", ("safe_completion", "safe_completion", "refusal_full"))]
    found = pick_examples([row for case in cases for row in judged(*case, records)], IDS)
    assert found[0].item_id == "differ/0"


@pytest.mark.parametrize(
    ("labels", "story"),
    [
        (("correct", "correct", "correct"), "task_held"),
        (("wrong", "correct", "correct"), "task_kept"),
        (("wrong", "wrong", "correct"), "task_restored"),
        (("correct", "wrong", "correct"), "task_restored"),
        (("wrong", "correct", "wrong"), "task_lost"),
        (("correct", "wrong", "wrong"), "task_wrong"),
        (("wrong", "wrong", "wrong"), "task_failed"),
    ],
)
def test_a_task_tells_when_it_was_learnt_or_lost(records, labels, story):
    (found,) = pick_examples(judged("mood/1", "task", "mood", labels, records), IDS)
    assert found.story == story


def test_a_request_refused_before_tuning_was_not_answered_throughout(records):
    labels = ("refusal_full", "safe_completion", "safe_completion")
    (found,) = pick_examples(judged("a/1", "benign", "ordinary", labels, records), IDS)
    assert found.story == "answer_gained"


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
