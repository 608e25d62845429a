# SPDX-License-Identifier: Apache-2.0
import random

from keelwright.report.answers import browse

ROLES = [("against", "against"), ("model", "model")]


def test_every_item_has_the_answer_of_each_model(rich_records):
    found = browse(rich_records, ROLES, primary="refusal_rate")
    assert found.total == len(found.entries) == len({one.item_id for one in rich_records})
    assert found.left_out == 0
    assert all([one.answer.role for one in entry.shown] == ["against", "model"] for entry in found.entries)


def test_what_turned_for_the_worse_comes_first_and_the_rest_follows(rich_records):
    found = browse(rich_records, ROLES, primary="refusal_rate")
    worse = next(turn for turn in found.turns if turn.key == "refusal_rate:worse")
    assert all("refusal_rate:worse" in entry.turns for entry in found.entries[: worse.count])
    assert not any("refusal_rate:worse" in entry.turns for entry in found.entries[worse.count :])


def test_the_order_does_not_depend_on_that_of_the_records(rich_records):
    shuffled = list(rich_records)
    random.Random(3).shuffle(shuffled)
    first, second = (browse(rows, ROLES, primary="refusal_rate") for rows in (rich_records, shuffled))
    assert [entry.item_id for entry in first.entries] == [entry.item_id for entry in second.entries]


def test_turns_are_shown_in_part_and_counted_in_full(rich_records):
    found = browse(rich_records, ROLES, primary="refusal_rate")
    worse = next(turn for turn in found.turns if turn.key == "refusal_rate:worse")
    assert (worse.count, len(worse.entries)) == (25, 8)


def test_items_beyond_the_limits_are_counted(rich_records):
    few = browse(rich_records, ROLES, primary="refusal_rate", most_items=5)
    assert (len(few.entries), few.left_out) == (5, few.total - 5)
    small = browse(rich_records, ROLES, primary="refusal_rate", most_bytes=10_000)
    assert 2 <= len(small.entries) < 10
    assert set(small.links.values()) == {f"item-{index + 1}" for index in range(len(small.entries))}


def test_answers_to_harmful_requests_are_folded_unless_they_refuse(rich_records):
    found = browse(rich_records, ROLES, primary="refusal_rate")
    for entry in found.entries:
        for one in entry.shown:
            assert one.answer.is_folded == (entry.kind == "harmful" and one.answer.label != "refused")


def test_no_refusal_is_not_called_unhelpful_by_a_judge_that_knows_no_harm(rich_records):
    found = browse(rich_records, ROLES, primary="refusal_rate")
    assert "answered, not helpful" not in {choice.title for choice in found.labels}
    verdicts = [one for entry in found.entries for shown in entry.shown for one in shown.verdicts]
    assert {one.judge for one in verdicts} == {"refusal-lists", "refusal-classifier"}
    assert not any("not helpful" in one.says for one in verdicts)


def test_filters_count_what_they_hold(rich_records):
    found = browse(rich_records, ROLES, primary="refusal_rate")
    assert {choice.value: choice.count for choice in found.sets}["alike"] == 12
    assert sum(choice.count for choice in found.kinds) == found.total
    assert found.differing == sum(entry.differs for entry in found.entries) == 12


def test_an_item_with_several_answers_shows_the_first_and_says_so(rich_records):
    found = browse(rich_records, ROLES, primary="refusal_rate")
    (talk,) = (entry for entry in found.entries if entry.item_id == "talk/1")
    assert [(one.answer.text, one.samples) for one in talk.shown] == [("kind people 0", 3)] * 2


def test_no_records_have_no_browser():
    assert browse([], ROLES, primary="harm_rate") is None
