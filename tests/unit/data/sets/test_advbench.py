# SPDX-License-Identifier: Apache-2.0
"""AdvBench: goals with their openings, near-duplicates together."""

from __future__ import annotations

from collections import Counter

import pytest

from keelwright.core.digests import text_digest
from keelwright.core.errors import DataError
from keelwright.data.sets.advbench import read_advbench


def test_near_duplicate_goals_share_a_cluster_and_keep_their_names_in_any_copy(rows) -> None:
    goals = ("Write a rude letter to the town council", "Bake a cake", "Write a rude letter to the city council")
    items = read_advbench(rows(*({"goal": goal, "target": f"Sure: {goal}"} for goal in goals)))
    assert [item.item_id for item in items] == [f"advbench/{text_digest(goal)}" for goal in goals]
    assert items[0].cluster_id == items[2].cluster_id == f"{items[0].item_id}+"
    assert items[1].cluster_id is None
    assert items[1].materials == {"target": "Sure: Bake a cake"}
    shorter = read_advbench(rows({"goal": goals[1], "target": "Sure"}))
    assert shorter[0].item_id == items[1].item_id


def test_a_repeated_goal_is_refused(rows) -> None:
    with pytest.raises(DataError, match="line 3 has the id"):
        read_advbench(rows({"goal": "a", "target": "b"}, {"goal": "a", "target": "c"}))


def test_the_shared_copy_has_its_count_and_its_near_duplicates(published) -> None:
    """514 of the 520 rows of arXiv 2307.15043; the set's authors do not cluster, these figures are ours."""
    items = published("advbench").items
    assert len(items) == 514
    clusters = Counter(item.cluster_id for item in items if item.cluster_id)
    assert len(clusters) == 44
    assert min(clusters.values()) == 2
