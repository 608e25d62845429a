# SPDX-License-Identifier: Apache-2.0
"""What sets share: exact and near, counted for either side."""

from __future__ import annotations

from keelwright.core.records import Item
from keelwright.data.overlap import HEADER, overlap_between, overlap_table, overlap_within, overlaps

BREAD = "how do i bake a good loaf of bread"
"""Nine words; with one more, nine of ten are shared."""


def items(suite: str, *prompts: str) -> list[Item]:
    return [Item(f"{suite}/{n}", suite, "benign", "kitchen", prompt) for n, prompt in enumerate(prompts, 1)]


LEFT = items("left", BREAD, "name three rivers", "what is a comet")
RIGHT = items("right", "How do I  bake a good loaf of bread", f"{BREAD} today", "who wrote faust", "sing a song")


def test_equal_and_near_prompts_are_told_apart() -> None:
    found = overlap_between("left", LEFT, "right", RIGHT)
    assert found.same == (("left/1", "right/1"),)
    assert found.near == (("left/1", "right/2"),)
    assert found.left_share == 1 / 3
    assert found.right_share == 2 / 4


def test_within_a_set_each_pair_comes_once() -> None:
    found = overlap_within("right", RIGHT)
    assert found.same == ()
    assert found.near == (("right/1", "right/2"),)
    assert found.left_ids == {"right/1", "right/2"}
    assert found.left_share == found.right_share == 0.5


def test_the_threshold_decides_what_is_near() -> None:
    assert overlap_within("right", RIGHT, threshold=0.95).near == ()


def test_the_table_has_a_row_for_each_set_and_each_two_sets() -> None:
    table = overlap_table(overlaps({"left": LEFT, "right": RIGHT}))
    assert HEADER == ("set", "and", "items", "same", "near", "share")
    assert table == [
        ("left", "itself", "3", "0", "0", "0.0%"),
        ("right", "itself", "4", "0", "1", "50.0%"),
        ("left", "right", "3, 4", "1", "1", "33.3%, 50.0%"),
    ]


def test_an_empty_set_shares_nothing() -> None:
    found = overlap_between("left", LEFT, "none", [])
    assert (found.left_share, found.right_share) == (0.0, 0.0)
