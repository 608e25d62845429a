# SPDX-License-Identifier: Apache-2.0
"""Exact counts by magnitude for edits that stream: which entries of a tensor are its K largest, in three passes.

The first pass finds the bin of the wanted magnitude, the second the magnitude itself. Of entries with exactly that
magnitude the lowest flat indices count as the larger ones, so a count is met exactly; the second pass also tells in
which part of the tensor the last of them lies, so that the third only looks at that part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keelwright.core.protocols import Chunk, Found, Stats, TensorEntry
from keelwright.ops.order_statistics import Cut, equal_indices, find_bin, find_cut, keep_between, magnitude_histogram

CUT_PASSES = 3
"""Passes over a tensor until its cuts are known."""

Ranks = Mapping[str, tuple[int, ...]]
"""By the name of a vector: for each of its cuts, how many of its entries lie above, from 1 to one less than all."""
Vector = Callable[[str], Tensor]
"""Gives the values of a named vector in a chunk; called only when they are needed."""

_BLOCK = 1 << 18
# More parts make the third pass shorter and the statistics of the second larger: 128 KiB each.
_PARTS = 16


@dataclass(frozen=True, slots=True)
class Edge:
    """A cut, with its place among the entries that have exactly its magnitude."""

    cut: Cut
    until: int
    """Flat index from which entries of that magnitude lie below the cut."""


Edges = Mapping[tuple[str, int], Edge]
"""By vector and rank."""


def reduce_cuts(vector: Vector, ranks: Ranks, chunk: Chunk, found: Found) -> dict[str, Tensor]:
    """Return the statistics of one chunk that the next pass needs; nothing once all cuts are known.

    Args:
        vector: Values of a vector in this chunk, in float32.
        ranks: The cuts wanted.
        chunk: The chunk.
        found: What the passes before came to.
    """
    if "bins" not in found:
        return {f"high {name}": magnitude_histogram(vector(name).reshape(-1)) for name in ranks if ranks[name]}
    part = chunk.offset // _part_size(chunk.entry.elements)
    if "open" not in found:
        stats = {}
        for name in ranks:
            if not ranks[name]:
                continue
            values = vector(name).reshape(-1)
            for prefix in {found["bins"][name, rank][0] for rank in ranks[name]}:
                counts = magnitude_histogram(values, prefix=prefix)
                stats[f"low {name} {prefix} {part}"] = counts.to(torch.int32)
        return stats
    stats = {}
    if "edges" not in found:
        for (name, rank), (cut, wanted_part, _) in found["open"].items():
            if part == wanted_part:
                places = equal_indices(vector(name).reshape(-1), cut)
                mask = torch.zeros(chunk.tensors[next(iter(chunk.tensors))].numel(), dtype=torch.bool)
                mask[places] = True
                stats[f"equal {name} {rank} {chunk.offset}"] = mask
    return stats


def open_span(entry: TensorEntry, found: Found) -> tuple[int, int]:
    """Return the elements that the next pass must see: in the third pass the parts that hold a cut, else all."""
    if "open" not in found or "edges" in found:
        return 0, entry.elements
    parts = [part for _, part, _ in found["open"].values()]
    if not parts:
        return 0, 0
    size = _part_size(entry.elements)
    return min(parts) * size, min(entry.elements, (max(parts) + 1) * size)


def settle_cuts(ranks: Ranks, entry: TensorEntry, sums: Stats, found: Found) -> dict[str, Any]:
    """Return what a pass came to: `bins` after the first, `open` after the second, `edges` after the third."""
    wanted = [(name, rank) for name in ranks for rank in ranks[name]]
    if "bins" not in found:
        return {"bins": {(name, rank): find_bin(sums[f"high {name}"], rank) for name, rank in wanted}}
    if "open" not in found:
        closed: dict[tuple[str, int], Edge] = {}
        still_open = {}
        for name, rank in wanted:
            prefix, above = found["bins"][name, rank]
            parts = [sums.get(f"low {name} {prefix} {part}") for part in range(_PARTS)]
            cut = find_cut(prefix, above, torch.stack([one for one in parts if one is not None]).sum(0), rank)
            if cut.equal_above == cut.equal:
                closed[name, rank] = Edge(cut, entry.elements)
            else:
                counts = [0 if one is None else int(one[cut.bits & 0x7FFF]) for one in parts]
                still_open[name, rank] = (cut, *_place(counts, cut.equal_above))
        return {"open": still_open, "closed": closed}
    edges = dict(found["closed"])
    for (name, rank), (cut, _, quota) in found["open"].items():
        edges[name, rank] = Edge(cut, _find_index(name, rank, quota, sums))
    return {"edges": edges}


def cuts_are_known(found: Found) -> bool:
    """Tell whether the passes of this tensor are through."""
    return "edges" in found


def keep_largest(
    values: Tensor, *, offset: int, elements: int, rank: int, edge: Edge | None, scale: float = 1.0
) -> Tensor:
    """Return `values * scale` for the `rank` largest magnitudes of the tensor, 0 elsewhere.

    Args:
        values: A flat run of the tensor.
        offset: Flat index of its first element.
        elements: Size of the tensor.
        rank: How many are kept, from 0 to all.
        edge: The cut of that rank; None where none or all are kept.
        scale: What is kept is multiplied with it.
    """
    if rank == 0:
        return torch.zeros_like(values)
    if rank == elements or edge is None:
        return values if scale == 1.0 else values * scale
    return keep_between(values, offset=offset, low=edge.cut, low_until=edge.until, scale=scale)


def keep_band(values: Tensor, *, offset: int, top: Edge | None, bottom: Edge | None, scale: float = 1.0) -> Tensor:
    """Return `values * scale` for what lies below the cut `top` and above the cut `bottom`, 0 elsewhere."""
    return keep_between(
        values,
        offset=offset,
        low=None if bottom is None else bottom.cut,
        low_until=None if bottom is None else bottom.until,
        high=None if top is None else top.cut,
        high_from=None if top is None else top.until,
        scale=scale,
    )


def _part_size(elements: int) -> int:
    """Return elements per part: whole blocks, and at most so many parts whatever the size of the tensor."""
    return _BLOCK * max(1, -(-elements // (_BLOCK * _PARTS)))


def _place(counts: list[int], quota: int) -> tuple[int, int]:
    """Return the part that holds the `quota`-th of the counted entries, and which one of that part's it is."""
    for part, count in enumerate(counts):
        if quota <= count:
            return part, quota
        quota -= count
    raise ValueError(f"{quota} entries more than were counted")


def _find_index(name: str, rank: int, quota: int, sums: Stats) -> int:
    """Return the flat index after the `quota`-th entry that equals the cut, within its part of the tensor."""
    label = f"equal {name} {rank} "
    for offset in sorted(int(key.removeprefix(label)) for key in sums if key.startswith(label)):
        places = sums[f"{label}{offset}"].nonzero().flatten()
        if quota <= places.numel():
            return offset + int(places[quota - 1]) + 1
        quota -= places.numel()
    raise ValueError(f"the entries at the cut of '{name}' changed between two passes")
