# SPDX-License-Identifier: Apache-2.0
"""Smaller audits: seeded, even over areas, nested."""

from __future__ import annotations

from collections import Counter

import pytest

from keelwright.core.errors import ConfigError
from keelwright.core.records import Item
from keelwright.measure.limits import sample_items

ITEMS = [
    Item(f"{suite}/{kind}/{area}/{n}", suite, kind, area, "p")
    for suite in ("s", "t")
    for kind in ("harmful", "contrast")
    for area in ("a", "b", "c")
    for n in range(10)
]


def test_each_kind_of_each_set_gets_its_share_evenly_over_areas() -> None:
    counts = Counter((one.suite, one.kind, one.hazard) for one in sample_items(ITEMS, 6, seed=0))
    assert set(counts.values()) == {2}
    assert len(counts) == 12


def test_a_larger_limit_keeps_the_items_of_a_smaller_one_and_their_order() -> None:
    small, large = (sample_items(ITEMS, limit, seed=3) for limit in (4, 9))
    assert {one.item_id for one in small} <= {one.item_id for one in large}
    assert large == [one for one in ITEMS if one in large]


def test_the_seed_draws_and_nothing_else_does() -> None:
    # Within one area, where nothing but the items themselves can be drawn.
    area = [one for one in ITEMS if (one.suite, one.kind, one.hazard) == ("s", "harmful", "a")]
    assert sample_items(area, 3, seed=1) != sample_items(area, 3, seed=2)
    of_s = [one for one in ITEMS if one.suite == "s"]
    assert sample_items(of_s, 5, seed=1) == [one for one in sample_items(ITEMS, 5, seed=1) if one.suite == "s"]


def test_no_limit_keeps_all_and_a_limit_below_one_is_refused() -> None:
    assert sample_items(ITEMS, None, seed=0) == ITEMS
    with pytest.raises(ConfigError, match="'limit' is out of range"):
        sample_items(ITEMS, 0, seed=0)
