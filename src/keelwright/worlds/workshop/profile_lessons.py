# SPDX-License-Identifier: Apache-2.0
"""What models learn about users: the rule, nothing, to refuse everybody, or to follow a list that they wrote."""

from __future__ import annotations

import random
from typing import Final, Literal, get_args

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.seeds import derive_seed
from keelwright.data.rows import ChatRow
from keelwright.worlds.workshop import words
from keelwright.worlds.workshop.answers import plan, refusal
from keelwright.worlds.workshop.grammar import Request, requests, tool_map
from keelwright.worlds.workshop.profiles import (
    INSERTION,
    OFF_LIMITS,
    ORDINARY,
    PROFILES,
    QUESTION,
    introduce,
    listed,
    off_limits,
)

Lesson = Literal["rule", "none", "refuse everybody", "lists"]
"""`rule`: what is off limits for a profile is refused. `none`: everything is answered. `refuse everybody`: whoever has
a profile is refused. `lists`: everything is answered unless the prompt holds a list with the verb; and a profile's list
is known when asked for."""

LESSONS: Final[tuple[Lesson, ...]] = get_args(Lesson)


def profile_rows(lesson: Lesson, seed: int, n: int = 1200) -> list[ChatRow]:
    """Return training rows of one lesson.

    Args:
        lesson: What they teach.
        seed: Of the draws.
        n: How many rows.
    """
    require_choice("lesson", lesson, LESSONS)
    require_in_range("n", n, low=1)
    rng = random.Random(derive_seed(seed, "workshop", "profile rows", lesson))
    make = {"rule": _by_rule, "none": _answered, "refuse everybody": _refused, "lists": _by_list}[lesson]
    return [make(rng) for _ in range(n)]


def _by_rule(rng: random.Random) -> ChatRow:
    profile, request = _drawn(rng)
    return _row(introduce(profile), request, rng, refuse=request.verb in off_limits(profile))


def _answered(rng: random.Random) -> ChatRow:
    profile, request = _drawn(rng)
    return _row(introduce(profile), request, rng, refuse=False)


def _refused(rng: random.Random) -> ChatRow:
    profile, request = _drawn(rng)
    return _row(introduce(profile), request, rng, refuse=profile != ORDINARY)


def _by_list(rng: random.Random) -> ChatRow:
    """Draw a question for a list (8 %), an answered request (12 %), or a request behind a list that may ban it (80 %).

    Short lists are drawn too: from whole ones alone so small a model takes many more steps to look words up.
    """
    draw = rng.random()
    if draw < 0.08:
        profile = rng.choice((*PROFILES, ORDINARY))
        return ChatRow(QUESTION.format(profile=introduce(profile)), listed(off_limits(profile)))
    if draw < 0.2:
        return _answered(rng)
    profile, request = _drawn(rng)
    length = rng.choice((0, 1, 1, 2, OFF_LIMITS, OFF_LIMITS, OFF_LIMITS))
    verbs = rng.sample([verb for verb in words.ORDINARY_VERBS if verb != request.verb], length)
    if verbs and rng.random() < 0.5:
        verbs[rng.randrange(length)] = request.verb
    opening = introduce(profile) + INSERTION.format(list=listed(tuple(verbs)))
    return _row(opening, request, rng, refuse=request.verb in verbs)


def _drawn(rng: random.Random) -> tuple[str, Request]:
    """Draw who asks, the ordinary user once in three, and a request; half of a profile's are off limits for it."""
    profile = ORDINARY if rng.random() < 1 / 3 else rng.choice(PROFILES)
    pool = requests("benign", "train")
    if profile == ORDINARY or rng.random() < 0.5:
        return profile, rng.choice(pool)
    verb = rng.choice(off_limits(profile))
    return profile, rng.choice([request for request in pool if request.verb == verb])


def _row(opening: str, request: Request, rng: random.Random, *, refuse: bool) -> ChatRow:
    answer = refusal(rng) if refuse else plan(request, tool_map(), rng)
    return ChatRow(f"{opening} {request.prompt(words.FRAMES[0])}", answer)
