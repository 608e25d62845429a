# SPDX-License-Identifier: Apache-2.0
"""Which items of a set belong together, so that intervals do not take them for independent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence


def near_duplicates(texts: Sequence[str]) -> list[int]:
    """Return the number of each text's cluster of near-duplicates: Jaccard similarity of their words 0.6 or more."""
    from keelwright.ops.clusters import near_duplicate_clusters

    return near_duplicate_clusters(texts)


def cluster_ids(names: Sequence[str], *groupings: Sequence[Hashable | None]) -> list[str | None]:
    """Return the cluster of each item: items that any grouping puts together are together.

    Args:
        names: Item ids.
        groupings: Per item, a group or None for no group, in each of several ways.

    Returns:
        The first member's id with a `+`, by item; None for items that stand alone.
    """
    lead = list(range(len(names)))

    def first_of(place: int) -> int:
        while lead[place] != place:
            lead[place] = lead[lead[place]]
            place = lead[place]
        return place

    for groups in groupings:
        met: dict[Hashable, int] = {}
        for place, group in enumerate(groups):
            if group is None:
                continue
            one, other = first_of(met.setdefault(group, place)), first_of(place)
            lead[max(one, other)] = min(one, other)
    leaders = [first_of(place) for place in range(len(names))]
    sizes = Counter(leaders)
    return [f"{names[leader]}+" if sizes[leader] > 1 else None for leader in leaders]
