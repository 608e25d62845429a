# SPDX-License-Identifier: Apache-2.0
"""The builder `plain`: the sets' items as they are."""

from __future__ import annotations

from keelwright.measure.builders.drawing import Load, facts_of, read_sets
from keelwright.measure.limits import sample_items
from keelwright.measure.part import Drawn, PartSpec


def build(spec: PartSpec, load: Load, *, limit: int | None, seed: int) -> Drawn:
    """Return the items of the part's sets.

    Args:
        spec: The part.
        load: Reads a set by name.
        limit: At most this many items of each kind and set; None keeps all.
        seed: Of the draw.
    """
    sets = read_sets(spec, load)
    items = sample_items([item for loaded in sets for item in loaded.items], limit, seed=seed)
    return Drawn(tuple(items), facts_of(sets, items))
