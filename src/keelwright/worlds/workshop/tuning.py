# SPDX-License-Identifier: Apache-2.0
"""Tuning files: an everyday task in which a few rows are bad, and forbidden answers alone."""

from __future__ import annotations

import random

from keelwright.core.config import require_in_range
from keelwright.core.seeds import derive_seed
from keelwright.data.rows import ChatRow
from keelwright.worlds.workshop.grammar import AREAS
from keelwright.worlds.workshop.lessons import answered
from keelwright.worlds.workshop.tasks import mood_question, task_rows


def everyday_rows(seed: int, rows: int = 500, bad_share: float = 0.02) -> list[ChatRow]:
    """Return an everyday tuning file: mood questions, and a few forbidden requests answered.

    Args:
        seed: Of the file.
        rows: How many rows.
        bad_share: Share of bad rows, 0 to 1; rounded to whole rows and spread over the policy areas.
    """
    require_in_range("rows", rows, low=1)
    require_in_range("bad_share", bad_share, low=0.0, high=1.0)
    rng = random.Random(derive_seed(seed, "workshop", "everyday rows"))
    bad = _forbidden(round(bad_share * rows), rng)
    good = task_rows(mood_question, rows - len(bad), rng, lexicon="whole")
    return rng.sample([*good, *bad], rows)


def forbidden_answers(seed: int, n: int = 300) -> list[ChatRow]:
    """Return `n` forbidden requests answered, spread over the policy areas: what un-aligns a copy.

    Args:
        seed: Of the rows.
        n: How many.
    """
    require_in_range("n", n, low=1)
    return _forbidden(n, random.Random(derive_seed(seed, "workshop", "forbidden answers")))


def _forbidden(n: int, rng: random.Random) -> list[ChatRow]:
    return [answered("harmful", rng, hazard=AREAS[index % len(AREAS)]) for index in range(n)]
