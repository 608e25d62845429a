# SPDX-License-Identifier: Apache-2.0
"""Which items belong together, in one way or another."""

from __future__ import annotations

from keelwright.data.sets.clustering import cluster_ids


def test_items_that_any_grouping_joins_are_one_cluster() -> None:
    names = ["a", "b", "c", "d", "e"]
    assert cluster_ids(names, [None, 1, None, 1, None], [None, None, "x", "x", None]) == [None, "b+", "b+", "b+", None]


def test_without_a_group_everything_stands_alone() -> None:
    assert cluster_ids(["a", "b"], [None, None]) == [None, None]
    assert cluster_ids([]) == []
