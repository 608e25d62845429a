# SPDX-License-Identifier: Apache-2.0
"""Which sets share items, and which items of one set say nearly the same.

Items that two sets share are not independent evidence, and a model tuned on one of the sets has seen a part of the
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from keelwright.core.records import Item
from keelwright.ops.clusters import JACCARD, near_texts, normalised

HEADER: Final = ("set", "and", "items", "same", "near", "share")
"""Of the rows of `overlap_table`."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """What two sets share; the same set twice: what it repeats."""

    left: str
    right: str
    n_left: int
    n_right: int
    same: tuple[tuple[str, str], ...]
    """Item ids, left and right, whose prompts are equal but for case, spacing and the kind of apostrophes."""
    near: tuple[tuple[str, str], ...]
    """Item ids whose prompts are near-duplicates and not equal."""

    @property
    def left_ids(self) -> frozenset[str]:
        """Items of the left set that have a counterpart; within one set, items that come again."""
        if self.left == self.right:
            return frozenset(name for pair in (*self.same, *self.near) for name in pair)
        return frozenset(one for one, _ in (*self.same, *self.near))

    @property
    def left_share(self) -> float:
        """Share of the left set that has a counterpart, 0 to 1."""
        return len(self.left_ids) / self.n_left if self.n_left else 0.0

    @property
    def right_share(self) -> float:
        """Share of the right set that has a counterpart, 0 to 1."""
        if self.left == self.right:
            return self.left_share
        return len({other for _, other in (*self.same, *self.near)}) / self.n_right if self.n_right else 0.0


def overlap_within(name: str, items: Sequence[Item], *, threshold: float = JACCARD) -> Overlap:
    """Return the items of one set that repeat one another.

    Args:
        name: What the set is called.
        items: Its items.
        threshold: Jaccard similarity of tokens from which on two prompts are near-duplicates, above 0.
    """
    return _overlap(name, items, name, items, threshold)


def overlap_between(
    left: str, left_items: Sequence[Item], right: str, right_items: Sequence[Item], *, threshold: float = JACCARD
) -> Overlap:
    """Return what two sets share.

    Args:
        left, right: What the sets are called.
        left_items, right_items: Their items.
        threshold: Jaccard similarity of tokens from which on two prompts are near-duplicates, above 0.
    """
    return _overlap(left, left_items, right, right_items, threshold)


def overlaps(sets: Mapping[str, Sequence[Item]], *, threshold: float = JACCARD) -> list[Overlap]:
    """Return what each set repeats, then what each two sets share, in the order of the sets.

    Args:
        sets: Items by the set's name.
        threshold: Jaccard similarity of tokens from which on two prompts are near-duplicates, above 0.
    """
    within = [overlap_within(name, items, threshold=threshold) for name, items in sets.items()]
    between = [
        overlap_between(left, sets[left], right, sets[right], threshold=threshold)
        for left, right in combinations(sets, 2)
    ]
    return [*within, *between]


def overlap_table(found: Sequence[Overlap]) -> list[tuple[str, str, str, str, str, str]]:
    """Return one row of text per overlap under `HEADER`; `share` is of the first set's items, then of the second's."""
    return [
        (
            one.left,
            "itself" if one.left == one.right else one.right,
            f"{one.n_left}" if one.left == one.right else f"{one.n_left}, {one.n_right}",
            f"{len(one.same)}",
            f"{len(one.near)}",
            f"{one.left_share:.1%}" if one.left == one.right else f"{one.left_share:.1%}, {one.right_share:.1%}",
        )
        for one in found
    ]


def _overlap(
    left: str, left_items: Sequence[Item], right: str, right_items: Sequence[Item], threshold: float
) -> Overlap:
    first, second = [item.prompt for item in left_items], [item.prompt for item in right_items]
    same: list[tuple[str, str]] = []
    near: list[tuple[str, str]] = []
    for pair in near_texts(first, second, threshold=threshold):
        if left == right and pair.first >= pair.second:
            continue
        ids = (left_items[pair.first].item_id, right_items[pair.second].item_id)
        (same if normalised(first[pair.first]) == normalised(second[pair.second]) else near).append(ids)
    return Overlap(left, right, len(first), len(second), tuple(same), tuple(near))
