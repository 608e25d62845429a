# SPDX-License-Identifier: Apache-2.0
"""Selection half and verification half: never the same items, never the same cluster."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from keelwright.core.records import Item
from keelwright.core.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class Halves:
    """Items to choose with, and items to verify with."""

    selection: tuple[Item, ...]
    verification: tuple[Item, ...]

    @property
    def all(self) -> tuple[Item, ...]:
        """Both halves."""
        return self.selection + self.verification


def split_items(items: Sequence[Item], *, seed: int) -> Halves:
    """Split items into halves of equal make-up.

    Clusters stay together. Within each kind and hazard the clusters are shuffled by the seed and dealt out in turn,
    beginning with the half that is smaller so far, so that odd strata do not tip the balance. The split depends on ids
    and seed alone, not on the order of `items`.

    Args:
        items: All items.
        seed: The run's seed.
    """
    clusters: dict[str, list[Item]] = defaultdict(list)
    for item in sorted(items, key=lambda one: one.item_id):
        clusters[item.cluster_id or item.item_id].append(item)
    strata: dict[tuple[str, str], list[str]] = defaultdict(list)
    for cluster, members in clusters.items():
        strata[(members[0].kind, members[0].hazard)].append(cluster)
    halves: tuple[list[Item], list[Item]] = ([], [])
    for stratum in sorted(strata):
        order = sorted(strata[stratum], key=lambda cluster: derive_seed(seed, "halves", cluster))
        first = 0 if len(halves[0]) <= len(halves[1]) else 1
        for place, cluster in enumerate(order):
            halves[(first + place) % 2].extend(clusters[cluster])
    return Halves(tuple(halves[0]), tuple(halves[1]))
