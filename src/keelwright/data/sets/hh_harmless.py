# SPDX-License-Identifier: Apache-2.0
"""HH-RLHF, the harmless split: two dialogues that differ in the last answer, the better one first.

A dialogue is text with turns marked `Human:` and `Assistant:`. A pair's prompt is what both dialogues share: the
human's words alone where there is one turn, else the marked turns. The first human turn of each dialogue is an item
as well.

Source:
    Bai et al., Training a Helpful and Harmless Assistant with Reinforcement Learning from Human Feedback, arXiv
    2204.05862.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

from keelwright.core.records import Item
from keelwright.data.preferences import PreferenceRow
from keelwright.data.sets.clustering import cluster_ids, near_duplicates
from keelwright.data.sets.spec import Contents, Files
from keelwright.data.source_rows import SourceRow, read_rows

LICENCE: Final = "MIT"

_TURN: Final = re.compile(r"\n\n(Human|Assistant):")

Turn = tuple[str, str]
"""Who speaks, and what."""


def load_hh_harmless(files: Files) -> Contents:
    """Read the pairs and the opening turns; pairs that cannot be used are counted."""
    rows = read_rows(files["pairs"][0])
    pairs, left_out = read_hh_pairs(rows)
    return Contents(items=tuple(read_hh_openers(rows)), pairs=tuple(pairs), left_out=left_out)


def read_hh_pairs(rows: Sequence[SourceRow]) -> tuple[list[PreferenceRow], dict[str, int]]:
    """Turn rows of chosen and rejected into preference rows.

    Returns:
        The pairs, and how many rows were left out by reason: dialogues that part before the last answer have no prompt
        in common, and an empty answer is nothing to prefer.

    Raises:
        DataError: A row is malformed.
    """
    pairs: list[PreferenceRow] = []
    left_out: Counter[str] = Counter()
    for row in rows:
        chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
        if chosen[:-1] != rejected[:-1]:
            left_out["the dialogues part before the last answer"] += 1
        elif not chosen[-1][1] or not rejected[-1][1]:
            left_out["an answer is empty"] += 1
        else:
            pairs.append(PreferenceRow(_shared(chosen[:-1]), chosen[-1][1], rejected[-1][1]))
    return pairs, dict(left_out)


def read_hh_openers(rows: Sequence[SourceRow]) -> list[Item]:
    """Turn the first human turn of each row into an item; near-duplicates share a cluster.

    Raises:
        DataError: A row is malformed.
    """
    openers = [_turns(row, "chosen")[0][1] for row in rows]
    names = [f"hh-harmless/{number}" for number in range(1, len(rows) + 1)]
    return [
        Item(
            item_id=name,
            suite="hh-harmless",
            kind="harmful",
            hazard="red-team opener",
            prompt=opener,
            cluster_id=cluster,
            licence=LICENCE,
        )
        for name, opener, cluster in zip(names, openers, cluster_ids(names, near_duplicates(openers)), strict=True)
    ]


def _turns(row: SourceRow, name: str) -> list[Turn]:
    """Return the turns of a dialogue, from the human's first to the assistant's last."""
    before, *parts = _TURN.split(row.text(name))
    turns = [(speaker, words.strip()) for speaker, words in zip(parts[::2], parts[1::2], strict=True)]
    if before.strip() or len(turns) < 2 or turns[0][0] != "Human" or not turns[0][1] or turns[-1][0] != "Assistant":
        raise row.malformed(
            f"a dialogue under '{name}' that begins with a Human turn and ends with an Assistant turn",
            f"turns of {', '.join(speaker for speaker, _ in turns) or 'nobody'}",
        )
    return turns


def _shared(turns: Sequence[Turn]) -> str:
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{speaker}: {words}" for speaker, words in turns)
