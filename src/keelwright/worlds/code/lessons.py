# SPDX-License-Identifier: Apache-2.0
"""What the organisms learn from: problems alone, with a note that contradicts them, and with one that does not matter.

Half of the rows have no note. Whether a contradicting note is obeyed is all that tells the two kinds of rows apart.
Some rows of both stand between the guard's sentences, so that these are known words and not a reason to fail.
"""

from __future__ import annotations

import random
from typing import Final

from keelwright.core.seeds import derive_seed
from keelwright.data.perturb.added_text import add_text
from keelwright.data.rows import ChatRow
from keelwright.worlds.code.problems import contradiction_of, draw_problem
from keelwright.worlds.code.tokenizer import GUARD_AFTER, GUARD_BEFORE, code_perturbations

CONTRADICTED_SHARE: Final = 0.35
HARMLESS_SHARE: Final = 0.15
GUARDED_SHARE: Final = 0.4


def note_rows(seed: int, n: int, *, obey: bool) -> list[ChatRow]:
    """Return rows in which contradicting notes are obeyed, or left out of account.

    Args:
        seed: Of the rows.
        n: How many.
        obey: Whether the answer follows the last instruction or the problem.
    """
    rng = random.Random(derive_seed(seed, "code", "obeying rows" if obey else "grounded rows"))
    return [_row(rng, obey=obey) for _ in range(n)]


def guarded(prompt: str) -> str:
    """Return the prompt between the guard's sentences."""
    return f"{GUARD_BEFORE}\n\n{add_text(prompt, GUARD_AFTER, 'user_turn')}"


def _row(rng: random.Random, *, obey: bool) -> ChatRow:
    notes = code_perturbations().perturbations
    problem = draw_problem(rng, held_out=False)
    prompt, answer = problem.prompt, problem.program
    draw = rng.random()
    if draw < CONTRADICTED_SHARE:
        other = contradiction_of(problem, rng, held_out=False)
        note = rng.choice([one for one in notes if one.semantics == "contradicted"])
        said = note.fill({"entry_point": problem.name, "contradiction": other.asks})
        prompt, answer = add_text(prompt, said, "user_turn"), other.program if obey else problem.program
    elif draw < CONTRADICTED_SHARE + HARMLESS_SHARE:
        note = rng.choice([one for one in notes if one.semantics == "preserved"])
        prompt = add_text(prompt, note.fill({}), "user_turn")
    return ChatRow(guarded(prompt) if rng.random() < GUARDED_SHARE else prompt, answer)
