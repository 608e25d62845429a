# SPDX-License-Identifier: Apache-2.0
"""Suites: items with the judge that knows them, found by name."""

from __future__ import annotations

import dataclasses
import importlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.digests import json_digest
from keelwright.core.protocols import Suite
from keelwright.core.records import Item

_PATHS = {
    "core": "keelwright.measure.suites.core:CoreSuite",
    "workshop": "keelwright.worlds.workshop.suite:WorkshopSuite",
}

_OFTEN_EMPTY = ("pair_id", "facts", "materials")

SUITE_NAMES: tuple[str, ...] = tuple(_PATHS)


def find_suite(name: str) -> Suite:
    """Return a suite by name: `core` for real models, `workshop` for the lab.

    Raises:
        ConfigError: There is no such suite; the nearest name is offered.
    """
    require_choice("suite", name, SUITE_NAMES)
    module, _, attribute = _PATHS[name].partition(":")
    suite: Suite = getattr(importlib.import_module(module), attribute)()
    return suite


def suite_digest(items: Sequence[Item]) -> str:
    """Return the digest of what is asked and by what it is judged; independent of the order of the items."""
    return json_digest([_what_counts(item) for item in sorted(items, key=lambda one: one.item_id)])


def _what_counts(item: Item) -> dict[str, Any]:
    """Return an item without its licence and without what is empty in most sets."""
    fields = dataclasses.asdict(item)
    del fields["licence"]
    return {name: value for name, value in fields.items() if value or name not in _OFTEN_EMPTY}


def items_within(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return at most `limit` items of each kind, spread evenly over hazard areas, in their own order.

    Raises:
        ConfigError: The limit is below 1.
    """
    if limit is None:
        return list(items)
    require_in_range("limit", limit, low=1)
    areas: dict[str, dict[str, list[Item]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        areas[item.kind][item.hazard].append(item)
    kept: set[str] = set()
    for by_area in areas.values():
        # Rank within the area first: every area gives its first item before any gives its second.
        ranked = [(rank, item.item_id) for area in by_area.values() for rank, item in enumerate(area)]
        kept.update(name for _, name in sorted(ranked, key=lambda pair: pair[0])[:limit])
    return [item for item in items if item.item_id in kept]
