# SPDX-License-Identifier: Apache-2.0
"""The one place where edits are evaluated: chunk by chunk, in float32, rounded once.

The bits of the result do not depend on the size of the chunks, on how the inputs are sharded, or on the order in
which tensors are taken. Memory is a few chunks, whatever the size of the tensor; only `Reach.MATRIX` reads it whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from keelwright.core.protocols import Chunk, Reach, Stats, TensorEntry, TensorSource, WeightEdit
from keelwright.models.dtypes import TORCH_DTYPES
from keelwright.models.headers import FLOAT_DTYPES
from keelwright.weights.numerics import require_finite, round_once, working_dtype

CHUNK_ELEMENTS = 1 << 18
"""1 MiB in float32: the working set of a chunk stays in the second-level cache."""

# Floating-point sums depend on where they are cut, so reductions always use the same blocks.
_REDUCTION_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One run of elements of an edited tensor."""

    offset: int
    """Index of the first element in the flattened tensor."""
    values: Tensor
    """1-D, in the output's dtype."""
    layout: Tensor
    """The same elements of the role that lays out the output: 1-D, as its source gave them."""


def evaluate(
    edit: WeightEdit, sources: Mapping[str, TensorSource], name: str, *, chunk_elements: int = CHUNK_ELEMENTS
) -> Iterator[tuple[int, Tensor]]:
    """Yield `(offset, values)` of one edited tensor: 1-D runs in the output's dtype, in order.

    Args:
        edit: What is done to the tensor.
        sources: A source for each role of the edit.
        name: The tensor.
        chunk_elements: Elements per run. Changes memory and speed, never the bits.

    Raises:
        NumericalError: An input holds NaN or infinity, or a value does not fit the output's dtype.
    """
    for part in walk(edit, sources, name, chunk_elements=chunk_elements):
        yield part.offset, part.values


def walk(
    edit: WeightEdit, sources: Mapping[str, TensorSource], name: str, *, chunk_elements: int = CHUNK_ELEMENTS
) -> Iterator[Evaluated]:
    """Yield what `evaluate` yields, with the layout role's own values beside it."""
    layout = edit.roles()[-1]
    entry = sources[layout].entries()[name]
    reach = effective_reach(edit, entry)
    if reach is Reach.COPY:
        yield from _copy(edit, sources, entry, chunk_elements)
        return
    if reach is Reach.MATRIX:
        chunk_elements = max(1, entry.elements)
    stats = _reduced(edit, sources, entry) if reach is Reach.REDUCED else None
    dtype = TORCH_DTYPES[entry.dtype]
    for start, stop in _runs(entry.elements, chunk_elements):
        raw = {role: sources[role].read(name, start, stop) for role in edit.roles()}
        wide = _widened(raw, sources, entry, start)
        if reach is Reach.MATRIX:
            wide = {role: values.view(entry.shape) for role, values in wide.items()}
        result = edit.edit(name, Chunk(wide, start, entry), stats).flatten()
        if result.numel() != stop - start:
            # Written all the same, it would run over the next tensor's bytes.
            raise ValueError(f"{edit!r} returned {result.numel()} values for {stop - start} elements of '{name}'")
        yield Evaluated(start, round_once(result, dtype, name=name, offset=start), raw[layout])


def effective_reach(edit: WeightEdit, entry: TensorEntry) -> Reach:
    """Return how the engine handles a tensor: what is no floating-point weight is always copied."""
    return edit.reach(entry.name) if entry.dtype in FLOAT_DTYPES else Reach.COPY


def copied_role(edit: WeightEdit, entry: TensorEntry) -> str:
    """Return the role whose bytes a copied tensor takes; for tensors that are no weights, the layout's."""
    return edit.copies(entry.name) if entry.dtype in FLOAT_DTYPES else edit.roles()[-1]


def _copy(
    edit: WeightEdit, sources: Mapping[str, TensorSource], entry: TensorEntry, chunk_elements: int
) -> Iterator[Evaluated]:
    role, layout = copied_role(edit, entry), edit.roles()[-1]
    dtype = TORCH_DTYPES[entry.dtype]
    for start, stop in _runs(entry.elements, chunk_elements):
        values = sources[role].read(entry.name, start, stop)
        beside = values if role == layout else sources[layout].read(entry.name, start, stop)
        if entry.dtype in FLOAT_DTYPES:
            require_finite(values, role=role, name=entry.name, offset=start, source=sources[role].describe())
            if values.dtype is not dtype:
                # The source is an adapter's sum in float32, or stores the tensor in another dtype than the layout.
                values = round_once(values, dtype, name=entry.name, offset=start)
        yield Evaluated(start, values, beside)


def _reduced(edit: WeightEdit, sources: Mapping[str, TensorSource], entry: TensorEntry) -> Stats:
    totals: dict[str, float] = defaultdict(float)
    for start, stop in _runs(entry.elements, _REDUCTION_ELEMENTS):
        raw = {role: sources[role].read(entry.name, start, stop) for role in edit.roles()}
        wide = _widened(raw, sources, entry, start)
        for key, value in edit.reduce(entry.name, Chunk(wide, start, entry)).items():
            totals[key] += float(value)
    return dict(totals)


def _widened(
    raw: Mapping[str, Tensor], sources: Mapping[str, TensorSource], entry: TensorEntry, offset: int
) -> dict[str, Tensor]:
    """Return a run of elements in the dtype that the edit is evaluated in, checked for NaN and infinity."""
    dtype = working_dtype(TORCH_DTYPES[entry.dtype])
    wide = {role: values.to(dtype) for role, values in raw.items()}
    for role, values in wide.items():
        require_finite(values, role=role, name=entry.name, offset=offset, source=sources[role].describe())
    return wide


def _runs(elements: int, chunk_elements: int) -> Iterator[tuple[int, int]]:
    for start in range(0, elements, chunk_elements):
        yield start, min(elements, start + chunk_elements)


def as_bytes(values: Tensor) -> memoryview:
    """Return the bytes of a 1-D tensor as they are stored, without a copy."""
    return values.contiguous().view(torch.uint8).numpy().data
