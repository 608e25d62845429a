# SPDX-License-Identifier: Apache-2.0
"""HH-RLHF: what two dialogues share is the prompt; what cannot be used is counted."""

from __future__ import annotations

import pytest

from keelwright.core.errors import DataError
from keelwright.data.preferences import PreferenceRow
from keelwright.data.sets.hh_harmless import read_hh_openers, read_hh_pairs

ASK = "\n\nHuman: May I borrow a pen?\n\nAssistant:"
TWO = f"{ASK} Which one?\n\nHuman: The blue one.\n\nAssistant:"


def test_one_turn_is_the_humans_words_alone(rows) -> None:
    pairs, left_out = read_hh_pairs(rows({"chosen": f"{ASK} Of course.", "rejected": f"{ASK} No!"}))
    assert pairs == [PreferenceRow("May I borrow a pen?", "Of course.", "No!")]
    assert left_out == {}


def test_several_turns_keep_their_marks(rows) -> None:
    (pair,), _ = read_hh_pairs(rows({"chosen": f"{TWO} Here.", "rejected": f"{TWO} Never."}))
    assert pair.prompt == "Human: May I borrow a pen?\n\nAssistant: Which one?\n\nHuman: The blue one."
    assert (pair.chosen, pair.rejected) == ("Here.", "Never.")


def test_pairs_that_cannot_be_used_are_counted(rows) -> None:
    pairs, left_out = read_hh_pairs(
        rows({"chosen": f"{TWO} Here.", "rejected": f"{ASK} No!"}, {"chosen": f"{ASK} ", "rejected": f"{ASK} No!"})
    )
    assert pairs == []
    assert left_out == {"the dialogues part before the last answer": 1, "an answer is empty": 1}


def test_openers_are_items_and_the_same_words_share_a_cluster(rows) -> None:
    row = {"chosen": f"{ASK} Yes.", "rejected": f"{ASK} No."}
    other = {key: text.replace("pen", "very heavy red bicycle") for key, text in row.items()}
    first, second, third = read_hh_openers(rows(row, row, other))
    assert (first.item_id, first.prompt, first.kind) == ("hh-harmless/1", "May I borrow a pen?", "harmful")
    assert first.cluster_id == second.cluster_id == "hh-harmless/1+"
    assert third.cluster_id is None


@pytest.mark.parametrize(
    "text", ["Hello", "\n\nAssistant: Hi\n\nHuman: Ho", "\n\nHuman: Hi", "\n\nHuman:\n\nAssistant: a"]
)
def test_what_is_no_dialogue_is_refused(rows, text: str) -> None:
    with pytest.raises(DataError, match="line 2 is malformed"):
        read_hh_pairs(rows({"chosen": text, "rejected": f"{ASK} No!"}))


def test_the_published_file_has_the_published_count(published) -> None:
    """2,312 pairs of the harmless test split (arXiv 2204.05862); nine of them cannot be used."""
    loaded = published("hh-harmless")
    assert len(loaded.items) == len(loaded.pairs) + sum(loaded.left_out.values()) == 2312
    assert loaded.left_out == {"the dialogues part before the last answer": 5, "an answer is empty": 4}
