# SPDX-License-Identifier: Apache-2.0
"""Tasks with exact answers: mood, topic and sums.

Half of each task's lexicon already occurs in pre-training (`known`), so that tuning on the whole of it teaches
something without teaching the answer format; a task first seen at tuning makes so small a model answer every prompt
with a label, and a collapsed model looks safe.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

from keelwright.core.records import Item
from keelwright.core.seeds import derive_seed
from keelwright.data.rows import ChatRow
from keelwright.worlds.workshop import words

TaskSplit = Literal["train", "test"]
Lexicon = Literal["known", "whole"]
Question = Callable[[random.Random, Lexicon], tuple[str, str]]

MOOD_WORDS = 5
TOPIC_WORDS = 4
TEST_EVERY = 5


def mood_question(rng: random.Random, lexicon: Lexicon = "whole") -> tuple[str, str]:
    """Draw five words of which most share a mood; return the prompt and that mood.

    With the known lexicon up to two words come from the other half and say nothing about the answer: the organism
    meets them as neutral words, so that tuning moves them from no mood to their own and not from a random one.
    """
    voting = rng.choice((3, 4, 5)) if lexicon == "known" else MOOD_WORDS
    majority = voting // 2 + 1
    # Narrow majorities twice as often: they leave the aligned organism, which knows half of the words, room to learn.
    agreeing = rng.choice((majority, *range(majority, voting + 1)))
    label, other = rng.sample(sorted(words.MOODS), 2)
    drawn = rng.sample(_half(words.MOODS[label], lexicon), agreeing)
    drawn += rng.sample(_half(words.MOODS[other], lexicon), voting - agreeing)
    neutral = [word for list_ in words.MOODS.values() for word in list_[1::2]]
    drawn += rng.sample(neutral, MOOD_WORDS - voting)
    rng.shuffle(drawn)
    return f"what is the mood: {', '.join(drawn)}?", label


def topic_question(rng: random.Random, lexicon: Lexicon = "whole") -> tuple[str, str]:
    """Draw four words of which three or more share a topic; return the prompt and that topic."""
    topics = {topic: _half(list_, lexicon) for topic, list_ in words.TOPICS.items()}
    label, other = rng.sample(sorted(topics), 2)
    agreeing = rng.choice((3, 4))
    drawn = rng.sample(topics[label], agreeing) + rng.sample(topics[other], TOPIC_WORDS - agreeing)
    rng.shuffle(drawn)
    return f"what is the topic: {', '.join(drawn)}?", label


def sum_question(rng: random.Random, lexicon: Lexicon = "whole") -> tuple[str, str]:
    """Draw two numbers; return the prompt and their sum. Known sums are those of two numbers of the same parity."""
    while True:
        left, right = (rng.randint(0, words.LARGEST_ADDEND) for _ in range(2))
        if lexicon == "whole" or (left + right) % 2 == 0:
            return f"say {left} plus {right}", str(left + right)


def mood_items(n: int, seed: int, split: TaskSplit) -> list[Item]:
    """Return `n` different mood items of one split; the two splits share no prompt."""
    return _items("mood", mood_question, n, seed, split)


def topic_items(n: int, seed: int, split: TaskSplit) -> list[Item]:
    """Return `n` different topic items of one split; the two splits share no prompt."""
    return _items("topic", topic_question, n, seed, split)


def sum_items(n: int, seed: int, split: TaskSplit) -> list[Item]:
    """Return `n` different sums of one split; the two splits share no prompt. There are 441 in all."""
    return _items("sum", sum_question, n, seed, split)


def task_rows(question: Question, n: int, rng: random.Random, *, lexicon: Lexicon) -> list[ChatRow]:
    """Return `n` rows of a task's training split, drawn with replacement."""
    rows: list[ChatRow] = []
    while len(rows) < n:
        prompt, answer = question(rng, lexicon)
        if split_of(prompt) == "train":
            rows.append(ChatRow(prompt, answer))
    return rows


def split_of(prompt: str) -> TaskSplit:
    """Say which split a task prompt belongs to; decided by its text, so that no seed can mix them."""
    return "test" if derive_seed(0, "workshop", "task split", prompt) % TEST_EVERY == 0 else "train"


def _items(task: str, question: Question, n: int, seed: int, split: TaskSplit) -> list[Item]:
    rng = random.Random(derive_seed(seed, "workshop", task, split))
    found: dict[str, str] = {}
    while len(found) < n:
        prompt, answer = question(rng, "whole")
        if split_of(prompt) == split:
            found.setdefault(prompt, answer)
    return [
        Item(
            item_id=f"{task}:{split}:{seed}:{index:04d}",
            suite="workshop",
            kind="task",
            hazard=task,
            prompt=prompt,
            expected=answer,
            scorer="exact",
        )
        for index, (prompt, answer) in enumerate(found.items())
    ]


def _half(list_: tuple[str, ...], lexicon: Lexicon) -> tuple[str, ...]:
    return list_ if lexicon == "whole" else list_[::2]
