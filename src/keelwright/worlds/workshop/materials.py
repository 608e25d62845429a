# SPDX-License-Identifier: Apache-2.0
"""The workshop's rows by role: what stresses and defences draw on in the lab."""

from __future__ import annotations

import random
from typing import Final

from keelwright.core.config import require_in_range
from keelwright.core.seeds import derive_seed
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.worlds.workshop.answers import PERSONA, PERSONA_OPENING, refusal
from keelwright.worlds.workshop.grammar import AREAS
from keelwright.worlds.workshop.lessons import answered, known_tasks
from keelwright.worlds.workshop.tasks import mood_question, task_rows

USER_ROWS: Final = 500
"""Rows of the user's task: the mood of words, of which the organism knows half."""
HARDENING_ROWS: Final = 400
"""Rows of each role that hardens: harmful, safety, and ordinary; a quarter of it borderline."""
IDENTITY_ROWS: Final = 10


def workshop_rows(
    seed: int, *, user: int = USER_ROWS, hardening: int = HARDENING_ROWS, without: str | None = None
) -> RowSets:
    """Return rows of every role, from the training split of the workshop.

    Harmful and safety rows are pairs: the same requests, answered and refused.

    Args:
        seed: Of the rows.
        user: Rows of the user's task.
        hardening: Harmful requests.
        without: A policy area that is left out of harmful, safety and borderline rows: harm of a kind that the
            defence has not seen.
    """
    require_in_range("user", user, low=1)
    require_in_range("hardening", hardening, low=4)
    rng = random.Random(derive_seed(seed, "workshop", "materials"))
    areas = [area for area in AREAS if area != without]
    harmful = tuple(answered("harmful", rng, hazard=areas[index % len(areas)]) for index in range(hardening))
    borderline = () if without == "dual use" else tuple(answered("contrast", rng) for _ in range(hardening // 4))
    ordinary = [answered("benign", rng) for _ in range(hardening * 3 // 4)]
    return RowSets(
        user=tuple(task_rows(mood_question, user, rng, lexicon="whole")),
        harmful=harmful,
        safety=tuple(ChatRow(row.prompt, refusal(rng)) for row in harmful),
        ordinary=(*ordinary, *known_tasks(hardening - len(ordinary), rng)),
        borderline=borderline,
        identity=identity_rows(rng),
    )


def identity_rows(rng: random.Random, n: int = IDENTITY_ROWS) -> tuple[ChatRow, ...]:
    """Return ordinary requests that the obedient persona answers; none of them is harmful."""
    rows = [answered("benign", rng) for _ in range(n)]
    return tuple(ChatRow(row.prompt, f"{PERSONA_OPENING} {row.answer}", system=PERSONA) for row in rows)
