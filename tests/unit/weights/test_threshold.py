# SPDX-License-Identifier: Apache-2.0
"""Exact counts by magnitude over three passes, in blocks of any size."""

from __future__ import annotations

import pytest
import torch

from keelwright.core.protocols import Chunk, TensorEntry
from keelwright.ops.task_vectors import trim
from keelwright.weights import threshold
from keelwright.weights.threshold import (
    CUT_PASSES,
    cuts_are_known,
    keep_band,
    keep_largest,
    reduce_cuts,
    settle_cuts,
)


def find(values, ranks, block):
    """Return what the passes come to, as the engine would run them, and the most statistics of one pass."""
    entry = TensorEntry("w", "F32", tuple(values.shape))
    found, most = {}, 0
    for _ in range(CUT_PASSES):
        sums = {}
        for first in range(0, values.numel(), block):
            chunk = Chunk({"v": values[first : first + block]}, first, entry)
            for key, value in reduce_cuts(lambda name, c=chunk: c.tensors[name], ranks, chunk, found).items():
                sums[key] = sums[key] + value if key in sums else value
        most = max(most, len(sums))
        found.update(settle_cuts(ranks, entry, sums, found))
    return found, most


@pytest.mark.parametrize("kind", ["normal", "duplicates", "equal", "tiny"])
@pytest.mark.parametrize("size", [2, 37, 1000])
def test_the_largest_are_those_of_a_sort(kind, size):
    random = torch.Generator().manual_seed(size)
    values = {
        "normal": torch.randn(size, generator=random),
        "duplicates": torch.randint(-3, 4, (size,), generator=random).float(),
        "equal": torch.ones(size),
        "tiny": torch.randn(size, generator=random) * 1e-40,
    }[kind]
    ranks = tuple(sorted({1, size // 3 or 1, size // 2, size - 1}))
    for block in (16, 1 << 18):
        found, _ = find(values, {"v": ranks}, block)
        assert cuts_are_known(found)
        for rank in ranks:
            kept = keep_largest(values, offset=0, elements=size, rank=rank, edge=found["edges"]["v", rank])
            assert torch.equal(kept, trim(values, rank))


def test_a_band_is_what_lies_between_two_cuts():
    random = torch.Generator().manual_seed(1)
    values = torch.randint(1, 6, (500,), generator=random).float()
    found, _ = find(values, {"v": (40, 340)}, 64)
    top, bottom = found["edges"]["v", 40], found["edges"]["v", 340]
    assert torch.equal(keep_band(values, offset=0, top=top, bottom=bottom), trim(values, 300, dropped=40))
    assert torch.equal(keep_band(values, offset=0, top=None, bottom=None, scale=2.0), values * 2.0)
    halves = [keep_band(values[i : i + 250], offset=i, top=top, bottom=bottom) for i in (0, 250)]
    assert torch.equal(torch.cat(halves), trim(values, 300, dropped=40))


def test_the_last_pass_looks_at_a_part_and_memory_does_not_grow_with_the_tensor(monkeypatch):
    monkeypatch.setattr(threshold, "_BLOCK", 4)
    values = torch.ones(8192)
    found, most = find(values, {"v": (5000,)}, 4)
    assert most <= 128, "statistics of one pass: one per block of a sixteenth of the tensor"
    _, part, _ = found["open"]["v", 5000]
    assert part == 5000 // 512 and found["edges"]["v", 5000].until == 5000


def test_none_and_all_need_no_cut():
    values = torch.tensor([1.0, -2.0])
    assert keep_largest(values, offset=0, elements=2, rank=0, edge=None).tolist() == [0, 0]
    assert keep_largest(values, offset=0, elements=2, rank=2, edge=None, scale=3.0).tolist() == [3, -6]
    found, most = find(values, {"v": ()}, 8)
    assert most == 0 and found["edges"] == {}


def test_float64_values_are_ordered_by_their_float32_values():
    values = torch.tensor([1.0, 1.0 + 1e-12, 3.0, -2.0], dtype=torch.float64)
    found, _ = find(values, {"v": (3,)}, 8)
    kept = keep_largest(values, offset=0, elements=4, rank=3, edge=found["edges"]["v", 3])
    assert kept.tolist() == [1.0, 0.0, 3.0, -2.0]
