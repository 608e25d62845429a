# SPDX-License-Identifier: Apache-2.0
"""The one place where edits are evaluated: chunk by chunk, in float32, rounded once.

The bits of the result do not depend on the size of the chunks, on how the inputs are sharded, or on the order in
which tensors are taken. Memory is a few chunks, whatever the size of the tensor; only `Reach.MATRIX` reads it whole,
and `Reach.ROWS` at least one row.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keelwright.core.protocols import Chunk, Found, Reach, TensorEntry, TensorSource, WeightEdit
from keelwright.models.dtypes import TORCH_DTYPES
from keelwright.models.headers import FLOAT_DTYPES
from keelwright.ops.philox import stream_key
from keelwright.ops.rounding import round_stochastically
from keelwright.weights.numerics import require_finite, round_once, widen, working_dtype

CHUNK_ELEMENTS = 1 << 18
"""1 MiB in float32: the working set of a chunk stays in the cache, and a block of 16-bit input is 512 KiB."""

# Floating-point sums depend on where they are cut, so reductions always use the same blocks.
_REDUCTION_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One run of elements of an edited tensor."""

    offset: int
    """Index of the first element in the flattened tensor."""
    values: Tensor
    """1-D, in the output's dtype."""
    beside: Tensor | None = None
    """The same elements of the role that was asked for beside them: 1-D, as its source gave them."""


def evaluate(
    edit: WeightEdit,
    sources: Mapping[str, TensorSource],
    entry: TensorEntry,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
    span: tuple[int, int] | None = None,
    rounding_seed: int | None = None,
    reduced: Callable[[Sequence[Found]], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield `(offset, values)` of one edited tensor: 1-D runs in the output's dtype, in order.

    Args:
        edit: What is done to the tensor; nothing is left to survey.
        sources: A source for each role of the edit.
        entry: The tensor in the output: name, dtype and shape.
        chunk_elements: Elements per run. Changes memory and speed, never the bits.
        span: Only these elements, from a multiple of `chunk_elements`; for tensors that `can_split`.
        rounding_seed: Round up or down by chance, drawn from this seed; None: to nearest.
        reduced: Told what the reductions of the tensor came to, before the first run.

    Raises:
        NumericalError: An input holds NaN or infinity, or a value does not fit the output's dtype.
    """
    for (part,) in sweep(
        (edit,),
        sources,
        entry,
        chunk_elements=chunk_elements,
        span=span,
        rounding_seed=rounding_seed,
        reduced=reduced,
    ):
        yield part.offset, part.values


def walk(
    edit: WeightEdit,
    sources: Mapping[str, TensorSource],
    entry: TensorEntry,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
    span: tuple[int, int] | None = None,
    beside: str | None = None,
) -> Iterator[Evaluated]:
    """Yield what `evaluate` yields, with the values of the role `beside` next to it."""
    for parts in sweep((edit,), sources, entry, chunk_elements=chunk_elements, span=span, beside=beside):
        yield parts[0]


def sweep(
    edits: Sequence[WeightEdit],
    sources: Mapping[str, TensorSource],
    entry: TensorEntry,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
    span: tuple[int, int] | None = None,
    beside: str | None = None,
    rounding_seed: int | None = None,
    reduced: Callable[[Sequence[Found]], None] | None = None,
) -> Iterator[tuple[Evaluated, ...]]:
    """Yield runs of one tensor as several edits make it, from one reading of the inputs.

    Args:
        edits: For example one method with several coefficients. Edits whose `shares` agree share their reductions.
        sources: A source for each role of every edit.
        entry: The tensor in the output.
        chunk_elements: Elements per run.
        span: Only these elements.
        beside: A role whose values are handed on as its source gives them.
        rounding_seed: Round up or down by chance, drawn from this seed; None: to nearest.
        reduced: Told what the reductions of each edit came to, before the first run.
    """
    reaches = [effective_reach(edit, entry) for edit in edits]
    found = _reductions(edits, reaches, sources, entry)
    if reduced is not None:
        reduced(found)
    pairs = list(zip(edits, reaches, strict=True))
    roles = list(dict.fromkeys(role for edit, reach in pairs for role in _read(edit, reach, entry)))
    computed = {role for edit, reach in pairs if reach is not Reach.COPY for role in edit.reads(entry.name)}
    unit, shape = _unit(reaches, entry, chunk_elements)
    dtype = TORCH_DTYPES[entry.dtype]
    start, end = span or (0, entry.elements)
    buffers: dict[str, Tensor] = {}
    for first in range(start, end, unit):
        last = min(end, first + unit)
        raw = {role: sources[role].read(entry.name, first, last) for role in roles}
        wide = {role: _widened(raw[role], role, sources[role], entry, first, buffers) for role in computed}
        if shape is not None:
            wide = {role: values.view(shape) for role, values in wide.items()}
        other = (
            None if beside is None else raw[beside] if beside in raw else sources[beside].read(entry.name, first, last)
        )
        chunk = Chunk(wide, first, entry)
        yield tuple(
            Evaluated(first, _result(edit, reach, raw, chunk, one, sources, dtype, last - first, rounding_seed), other)
            for (edit, reach), one in zip(pairs, found, strict=True)
        )


def reduce_tensor(edit: WeightEdit, sources: Mapping[str, TensorSource], entry: TensorEntry) -> Found:
    """Return what the reductions of one tensor come to; empty where the edit needs none."""
    return _reductions((edit,), (effective_reach(edit, entry),), sources, entry)[0]


def effective_reach(edit: WeightEdit, entry: TensorEntry) -> Reach:
    """Return how the engine handles a tensor: what is no floating-point weight is always copied."""
    return edit.reach(entry.name) if entry.dtype in FLOAT_DTYPES else Reach.COPY


def copied_role(edit: WeightEdit, entry: TensorEntry) -> str:
    """Return the role whose bytes a copied tensor takes; for what is no weight, the layout's where it is read."""
    if entry.dtype in FLOAT_DTYPES:
        return edit.copies(entry.name)
    layout, reads = edit.roles()[-1], edit.reads(entry.name)
    return layout if layout in reads else reads[0]


def can_split(edit: WeightEdit, entry: TensorEntry) -> bool:
    """Tell whether parts of the tensor can be evaluated apart from each other without doing anything twice."""
    return effective_reach(edit, entry) in (Reach.COPY, Reach.POINTWISE)


def _read(edit: WeightEdit, reach: Reach, entry: TensorEntry) -> tuple[str, ...]:
    return (copied_role(edit, entry),) if reach is Reach.COPY else edit.reads(entry.name)


def _unit(reaches: Sequence[Reach], entry: TensorEntry, chunk_elements: int) -> tuple[int, tuple[int, ...] | None]:
    """Return elements per run, and the shape of a run that is not flat."""
    if Reach.MATRIX in reaches:
        return max(1, entry.elements), entry.shape
    if Reach.ROWS in reaches:
        columns = entry.shape[-1] if entry.shape else 1
        return max(1, chunk_elements // max(1, columns)) * max(1, columns), (-1, columns)
    return chunk_elements, None


def _result(
    edit: WeightEdit,
    reach: Reach,
    raw: Mapping[str, Tensor],
    chunk: Chunk,
    found: Found,
    sources: Mapping[str, TensorSource],
    dtype: torch.dtype,
    size: int,
    rounding_seed: int | None,
) -> Tensor:
    entry = chunk.entry
    if reach is Reach.COPY:
        role = copied_role(edit, entry)
        values = raw[role]
        if entry.dtype in FLOAT_DTYPES:
            require_finite(values, role=role, name=entry.name, offset=chunk.offset, source=sources[role].describe())
            if values.dtype is not dtype:
                # The source is an adapter's sum in float32, or stores the tensor in another dtype than the layout.
                values = _rounded(values, dtype, entry.name, chunk.offset, rounding_seed)
        return values
    result = edit.edit(entry.name, chunk, found).reshape(-1)
    if result.numel() != size:
        # Written all the same, it would run over the next tensor's bytes.
        raise ValueError(f"{edit!r} returned {result.numel()} values for {size} elements of '{entry.name}'")
    if result.dtype is dtype and any(result.data_ptr() == one.data_ptr() for one in chunk.tensors.values()):
        result = result.clone()  # the chunk's memory is used again before this is written
    return _rounded(result, dtype, entry.name, chunk.offset, rounding_seed)


def _rounded(values: Tensor, dtype: torch.dtype, name: str, offset: int, seed: int | None) -> Tensor:
    """Return values in the output's dtype, checked: rounded to nearest even, or by chance where there is a seed."""
    nearest = round_once(values, dtype, name=name, offset=offset)
    if seed is None or torch.promote_types(values.dtype, dtype) is dtype:
        return nearest
    wide = values if values.dtype is torch.float64 else values.float()
    # A word of its own: no method's mask is drawn from this stream.
    return round_stochastically(wide, dtype, key=stream_key(seed, "rounding", name), offset=offset)


def _reductions(
    edits: Sequence[WeightEdit], reaches: Sequence[Reach], sources: Mapping[str, TensorSource], entry: TensorEntry
) -> list[Found]:
    """Return what the reductions of each edit come to; edits that share them are reduced once."""
    known: dict[Hashable, Found] = {}
    results: list[Found] = []
    for number, (edit, reach) in enumerate(zip(edits, reaches, strict=True)):
        shared = edit.shares()
        key = (number,) if shared is None else (type(edit), shared)
        if key not in known:
            rows = reach is Reach.ROWS
            passes = edit.passes(entry.name) if reach in (Reach.REDUCED, Reach.ROWS) else 0
            found: dict[str, Any] = {}
            for _ in range(passes):
                found.update(edit.settle(entry, _sums(edit, sources, entry, found, rows=rows), found))
            known[key] = found
        results.append(known[key])
    return results


def _sums(
    edit: WeightEdit, sources: Mapping[str, TensorSource], entry: TensorEntry, found: Found, *, rows: bool
) -> dict[str, Any]:
    totals: dict[str, Any] = {}
    unit, shape = _unit((Reach.ROWS,) if rows else (Reach.REDUCED,), entry, _REDUCTION_ELEMENTS)
    buffers: dict[str, Tensor] = {}
    start, end = edit.span(entry, found)
    for first in range(start, end, unit):
        last = min(end, first + unit)
        wide = {
            role: _widened(sources[role].read(entry.name, first, last), role, sources[role], entry, first, buffers)
            for role in edit.reads(entry.name)
        }
        if shape is not None:
            wide = {role: values.view(shape) for role, values in wide.items()}
        for key, value in edit.reduce(entry.name, Chunk(wide, first, entry), found).items():
            totals[key] = totals[key] + value if key in totals else value
    return totals


def _widened(
    values: Tensor, role: str, source: TensorSource, entry: TensorEntry, offset: int, buffers: dict[str, Tensor]
) -> Tensor:
    """Return a run of elements in the dtype that the edit is evaluated in, checked for NaN and infinity."""
    dtype = working_dtype(TORCH_DTYPES[entry.dtype])
    buffer = buffers.get(role)
    if buffer is None or buffer.numel() < values.numel():
        buffer = buffers[role] = torch.empty(values.numel(), dtype=dtype)
    wide, is_finite = widen(values, dtype, buffer[: values.numel()])
    if not is_finite:
        require_finite(values, role=role, name=entry.name, offset=offset, source=source.describe())
    return wide


def as_bytes(values: Tensor) -> memoryview:
    """Return the bytes of a 1-D tensor as they are stored, without a copy."""
    return values.contiguous().view(torch.uint8).numpy().data
