# SPDX-License-Identifier: Apache-2.0
"""A smaller audit of the same suite: items drawn by seed within strata of kind and hazard."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from keelwright.core.config import require_in_range
from keelwright.core.records import Item
from keelwright.core.seeds import derive_seed


def sample_items(items: Sequence[Item], limit: int | None, *, seed: int) -> list[Item]:
    """Return at most `limit` items of each kind and set, spread evenly over hazard areas, in their own order.

    Every area gives its first item before any gives its second. Which of an area's items come first depends on the seed
    and the item's id alone: a larger limit keeps all the items of a smaller one, and other sets change nothing.

    Args:
        items: Of one or several sets.
        limit: Items of each kind and set; None keeps all.
        seed: Of the draw.

    Raises:
        ConfigError: The limit is below 1.
    """
    if limit is None:
        return list(items)
    require_in_range("limit", limit, low=1)
    areas: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        areas[item.suite, item.kind][item.hazard].append(item.item_id)
    kept: set[str] = set()
    for by_area in areas.values():
        ranked = [
            (rank, derive_seed(seed, "limit", area), name)
            for area, names in by_area.items()
            for rank, name in enumerate(sorted(names, key=lambda one: derive_seed(seed, "limit", one)))
        ]
        kept.update(name for _, _, name in sorted(ranked)[:limit])
    return [item for item in items if item.item_id in kept]
