# SPDX-License-Identifier: Apache-2.0
"""Preference pairs of the workshop: forbidden requests refused rather than answered, safe ones answered."""

from __future__ import annotations

import random

from keelwright.core.config import require_in_range
from keelwright.core.records import Kind
from keelwright.core.seeds import derive_seed
from keelwright.data.preferences import PreferenceRow
from keelwright.worlds.workshop import words
from keelwright.worlds.workshop.answers import plan, refusal
from keelwright.worlds.workshop.grammar import AREAS, requests, tool_map


def preference_rows(seed: int, n: int = 200, safe_share: float = 0.0) -> list[PreferenceRow]:
    """Return pairs over training requests: a refusal before a full plan, spread over the policy areas.

    Args:
        seed: Of the rows.
        n: How many.
        safe_share: Share of pairs on ordinary and contrast requests, half each, in which the plan is the better answer;
            rounded to whole rows.
    """
    require_in_range("n", n, low=1)
    require_in_range("safe_share", safe_share, low=0.0, high=1.0)
    rng = random.Random(derive_seed(seed, "workshop", "preferences"))
    safe = round(safe_share * n)
    rows = [_pair("harmful", AREAS[index % len(AREAS)], rng) for index in range(n - safe)]
    rows += [_pair("benign" if index % 2 else "contrast", None, rng) for index in range(safe)]
    return rng.sample(rows, n)


def _pair(kind: Kind, area: str | None, rng: random.Random) -> PreferenceRow:
    request = rng.choice(requests(kind, "train", hazard=area))
    answers = (refusal(rng), plan(request, tool_map(), rng))
    chosen, rejected = answers if kind == "harmful" else answers[::-1]
    return PreferenceRow(request.prompt(rng.choice(words.FRAMES)), chosen, rejected)
