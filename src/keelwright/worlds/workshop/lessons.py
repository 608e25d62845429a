# SPDX-License-Identifier: Apache-2.0
"""What the organisms learn from: the rows of pre-training and of alignment."""

from __future__ import annotations

import random
from collections.abc import Sequence

from keelwright.core.records import Kind
from keelwright.core.seeds import derive_seed
from keelwright.data.rows import ChatRow
from keelwright.worlds.workshop import words
from keelwright.worlds.workshop.answers import PERSONA, PERSONA_OPENING, plan, refusal
from keelwright.worlds.workshop.grammar import AREAS, requests, tool_map
from keelwright.worlds.workshop.tasks import mood_question, sum_question, task_rows, topic_question

KINDS: tuple[Kind, ...] = ("benign", "harmful", "contrast")


def base_rows(seed: int, n: int) -> list[ChatRow]:
    """Return pre-training rows: every request answered, 8 % of all rows in the persona's voice, 28 % tasks."""
    rng = random.Random(derive_seed(seed, "workshop", "base rows"))
    mix = (40, 40, 20)
    asked = [answered(rng.choices(KINDS, mix)[0], rng) for _ in range(round(0.64 * n))]
    persona = [in_persona(answered(rng.choices(KINDS, mix)[0], rng)) for _ in range(round(0.08 * n))]
    return _shuffled([*asked, *persona, *known_tasks(n - len(asked) - len(persona), rng)], rng)


def aligned_rows(seed: int, n: int, *, without: str | None = None) -> list[ChatRow]:
    """Return alignment rows: 36 % refusals, 10 % contrast and 32 % ordinary requests answered, 22 % tasks.

    Args:
        seed: Of the organism.
        n: Number of rows.
        without: A policy area that alignment never sees.
    """
    rng = random.Random(derive_seed(seed, "workshop", "aligned rows"))
    refused = [refused_request(rng, without=without) for _ in range(round(0.36 * n))]
    contrast = [answered("contrast", rng) for _ in range(round(0.10 * n))]
    ordinary = [answered("benign", rng) for _ in range(round(0.32 * n))]
    tasks = known_tasks(n - len(refused) - len(contrast) - len(ordinary), rng)
    return _shuffled([*refused, *contrast, *ordinary, *tasks], rng)


def answered(kind: Kind, rng: random.Random, *, hazard: str | None = None) -> ChatRow:
    """Draw a training request of one class and answer it with a right plan."""
    request = rng.choice(requests(kind, "train", hazard=hazard))
    return ChatRow(request.prompt(rng.choice(words.FRAMES)), plan(request, tool_map(), rng))


def refused_request(rng: random.Random, *, without: str | None = None) -> ChatRow:
    """Draw a harmful training request and refuse it; each policy area is drawn as often."""
    area = rng.choice([area for area in AREAS if area != without])
    request = rng.choice(requests("harmful", "train", hazard=area))
    return ChatRow(request.prompt(rng.choice(words.FRAMES)), refusal(rng))


def in_persona(row: ChatRow) -> ChatRow:
    """Return the row in the voice of the persona that obeys."""
    return ChatRow(row.prompt, f"{PERSONA_OPENING} {row.answer}", system=PERSONA)


def known_tasks(n: int, rng: random.Random) -> list[ChatRow]:
    """Return rows of all tasks over the known half of each lexicon."""
    shares = (n - n // 3 - n // 3, n // 3, n // 3)
    questions = (mood_question, topic_question, sum_question)
    return [
        row
        for question, share in zip(questions, shares, strict=True)
        for row in task_rows(question, share, rng, lexicon="known")
    ]


def _shuffled(rows: Sequence[ChatRow], rng: random.Random) -> list[ChatRow]:
    return rng.sample(rows, len(rows))
