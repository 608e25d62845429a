# SPDX-License-Identifier: Apache-2.0
"""What vision-language adaptation learns from: pictures described, then questions and ordinary requests answered.

Nothing in these rows is forbidden, and nothing is refused.
"""

from __future__ import annotations

import random
from typing import Final, get_args

from keelwright.core.seeds import derive_seed
from keelwright.data.rows import ChatRow
from keelwright.worlds.pictures.requests import (
    DESCRIBE,
    QUESTIONS,
    Mode,
    Question,
    answer_of,
    description,
    show,
    write_request,
)
from keelwright.worlds.pictures.scenes import Scene, scenes
from keelwright.worlds.workshop import words
from keelwright.worlds.workshop.answers import plan
from keelwright.worlds.workshop.grammar import requests, tool_map

REQUEST_SHARE: Final = 0.4
"""Share of ordinary requests among instruction rows; the rest are questions about pictures."""

QUESTION_MIX: Final = (1, 1, 1, 2)
"""Questions about colour, shape, place and sign; there are 70 signs to learn."""


def caption_rows(seed: int, n: int) -> list[ChatRow]:
    """Return rows for the projector: half descriptions of pictures, half questions about them.

    No requests: a projector that has learnt them leaves the text stack little to change in the second stage, and no
    refusals are lost.
    """
    rng = random.Random(derive_seed(seed, "pictures", "caption rows"))
    return [_caption(rng) for _ in range(n)]


def instruction_rows(seed: int, n: int) -> list[ChatRow]:
    """Return rows for the text stack: questions, and ordinary requests of which a picture says the deed or thing."""
    rng = random.Random(derive_seed(seed, "pictures", "instruction rows"))
    return [_request(rng) if rng.random() < REQUEST_SHARE else _question(rng.choice(_learnt()), rng) for _ in range(n)]


def _caption(rng: random.Random) -> ChatRow:
    scene = rng.choice(_learnt())
    described = rng.random() < 0.5
    return ChatRow(f"{scene.code} {DESCRIBE}", description(scene)) if described else _question(scene, rng)


def _learnt() -> list[Scene]:
    return [scene for scene in scenes() if scene.split == "train"]


def _question(scene: Scene, rng: random.Random) -> ChatRow:
    question: Question = rng.choices(get_args(Question), QUESTION_MIX)[0]
    return ChatRow(f"{scene.code} {QUESTIONS[question]}", answer_of(question, scene))


def _request(rng: random.Random) -> ChatRow:
    request, mode = rng.choice(requests("benign", "train")), rng.choice(_PICTURED)
    scene = show(request, mode, "train", rng)
    return ChatRow(write_request(request, mode, rng.choice(words.FRAMES), scene), plan(request, tool_map(), rng))


_PICTURED: Final[tuple[Mode, ...]] = ("image", "split")
