# SPDX-License-Identifier: Apache-2.0
"""Tasks with exact answers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest

from keelwright.core.records import Item
from keelwright.worlds.workshop import words
from keelwright.worlds.workshop.tasks import (
    Question,
    mood_items,
    mood_question,
    split_of,
    sum_items,
    sum_question,
    task_rows,
    topic_items,
    topic_question,
)

Items = Callable[..., list[Item]]


def _listed(prompt: str) -> list[str]:
    return re.findall(r"\w+", prompt.split(":")[1])


@pytest.mark.parametrize("items", [mood_items, topic_items, sum_items])
def test_items_are_different_repeatable_and_of_one_split(items: Items) -> None:
    found = items(60, 3, "test")
    assert len({item.prompt for item in found}) == len({item.item_id for item in found}) == 60
    assert found == items(60, 3, "test")
    assert [item.prompt for item in found] != [item.prompt for item in items(60, 4, "test")]
    assert {split_of(item.prompt) for item in found} == {"test"}
    assert {(item.kind, item.scorer) for item in found} == {("task", "exact")}


@pytest.mark.parametrize("items", [mood_items, topic_items, sum_items])
def test_the_splits_share_no_prompt(items: Items) -> None:
    assert not {one.prompt for one in items(50, 0, "train")} & {one.prompt for one in items(50, 0, "test")}


def test_a_mood_is_that_of_the_majority() -> None:
    for item in mood_items(100, 0, "test"):
        votes = {mood: sum(word in list_ for word in _listed(item.prompt)) for mood, list_ in words.MOODS.items()}
        assert sum(votes.values()) == 5
        assert max(votes, key=votes.__getitem__) == item.expected


def test_a_topic_is_that_of_the_majority() -> None:
    for item in topic_items(100, 0, "test"):
        votes = {topic: sum(word in list_ for word in _listed(item.prompt)) for topic, list_ in words.TOPICS.items()}
        assert max(votes, key=votes.__getitem__) == item.expected
        assert max(votes.values()) >= 3


def test_a_sum_is_right() -> None:
    for item in sum_items(60, 0, "test"):
        left, right = map(int, re.findall(r"\d+", item.prompt))
        assert item.expected == str(left + right)


def test_known_mood_questions_are_decided_by_the_known_half() -> None:
    rng = random.Random(0)
    known = {mood: list_[::2] for mood, list_ in words.MOODS.items()}
    for _ in range(200):
        prompt, mood = mood_question(rng, "known")
        votes = {label: sum(word in list_ for word in _listed(prompt)) for label, list_ in known.items()}
        assert len(_listed(prompt)) == 5
        assert max(votes, key=votes.__getitem__) == mood
        assert votes["bright"] != votes["dark"]


def test_words_of_the_unknown_half_say_nothing_before_tuning() -> None:
    rng = random.Random(1)
    hidden = {mood: set(list_[1::2]) for mood, list_ in words.MOODS.items()}
    agree = []
    for _ in range(3000):
        prompt, mood = mood_question(rng, "known")
        agree += [word in hidden[mood] for word in _listed(prompt) if any(word in list_ for list_ in hidden.values())]
    assert len(agree) > 2000
    assert abs(sum(agree) / len(agree) - 0.5) < 0.04


def test_known_topics_and_sums_keep_to_their_half() -> None:
    rng = random.Random(0)
    known = {word for list_ in words.TOPICS.values() for word in list_[::2]}
    for _ in range(100):
        assert set(_listed(topic_question(rng, "known")[0])) <= known
        prompt, _ = sum_question(rng, "known")
        assert sum(map(int, re.findall(r"\d+", prompt))) % 2 == 0


@pytest.mark.parametrize("question", [mood_question, topic_question, sum_question])
def test_training_rows_never_hold_a_test_prompt(question: Question) -> None:
    rows = task_rows(question, 300, random.Random(0), lexicon="whole")
    assert len(rows) == 300
    assert {split_of(row.prompt) for row in rows} == {"train"}
