# SPDX-License-Identifier: Apache-2.0
"""Which answers an engine still has to make."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from keelwright.core.decoding import DecodingConfig
from keelwright.core.errors import DataError
from keelwright.core.records import Item


def wanted_answers(
    items: Sequence[Item], decoding: DecodingConfig, have: Collection[tuple[str, int]]
) -> list[tuple[Item, int]]:
    """Return the pairs of item and sample that are not there yet, item by item.

    Args:
        items: Requests.
        decoding: Says how many answers each item gets.
        have: Answers that are there already, as pairs of item id and sample.

    Raises:
        DataError: Two items share an id.
    """
    seen: set[str] = set()
    for item in items:
        if item.item_id in seen:
            raise DataError(
                "Two items have the same id.",
                expected="a different id for every item",
                found=f"'{item.item_id}' twice",
                fix="rename one of them",
            )
        seen.add(item.item_id)
    known = frozenset(have)
    return [
        (item, sample) for item in items for sample in range(decoding.samples) if (item.item_id, sample) not in known
    ]
