# SPDX-License-Identifier: Apache-2.0
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from keelwright.core.records import Item
from keelwright.heal.halves import split_items

AREAS = ("curses", "thefts", "forgeries")


def items(per_area=7):
    pairs = []
    for area in AREAS:
        for number in range(per_area):
            for kind in ("harmful", "contrast"):
                pairs.append(Item(f"{area}/{kind}/{number}", "s", kind, area, "p", cluster_id=f"{area}/{number}"))
    return [*pairs, *(Item(f"o/{number}", "s", "benign", "ordinary", "p") for number in range(9))]


def test_halves_share_no_item_and_no_cluster_and_lose_none():
    halves = split_items(items(), seed=0)
    ids = [{item.item_id for item in half} for half in (halves.selection, halves.verification)]
    clusters = [{item.cluster_id or item.item_id for item in half} for half in (halves.selection, halves.verification)]
    assert not ids[0] & ids[1]
    assert not clusters[0] & clusters[1]
    assert ids[0] | ids[1] == {item.item_id for item in items()}


def test_every_kind_and_area_is_dealt_evenly():
    halves = split_items(items(), seed=3)
    counts = [Counter((item.kind, item.hazard) for item in half) for half in (halves.selection, halves.verification)]
    assert all(abs(counts[0][key] - counts[1][key]) <= 1 for key in counts[0] | counts[1])
    assert abs(len(halves.selection) - len(halves.verification)) <= 2


def test_seed_changes_the_split():
    assert split_items(items(), seed=0) != split_items(items(), seed=1)


@given(st.permutations(items(3)))
def test_order_of_items_does_not_matter(shuffled):
    assert split_items(shuffled, seed=0) == split_items(items(3), seed=0)
