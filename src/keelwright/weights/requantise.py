# SPDX-License-Identifier: Apache-2.0
"""Outputs in 8-bit floating point again: every weight that the layout's model stores in F8, with fresh scales.

The edit is evaluated in float32, not rounded; each block's scale is its largest magnitude over the largest number of
the format, so that the block fills the format's range; and each weight over its scale is rounded once, to nearest
even. The blocks, the names and the dtypes of the scales are those of the layout's model. A weight that the edit only
copies keeps its bytes and its scales.

Every weight is evaluated twice, for its scales and for its values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from keelwright.core.digests import json_digest
from keelwright.core.errors import ConfigError, ModelMismatchError, NumericalError
from keelwright.core.protocols import Chunk, Found, Progress, Reach, Stats, TensorEntry, TensorSource, WeightEdit
from keelwright.models.dtypes import TORCH_DTYPES
from keelwright.models.float8 import Float8Checkpoint, Scaling, largest, lines_of_rows, scales_of_range
from keelwright.models.headers import FLOAT8_DTYPES
from keelwright.models.memory import require_memory
from keelwright.weights.edit import Edit
from keelwright.weights.layout import lay_out
from keelwright.weights.plan import MAX_SHARD_BYTES, Plan, Planned, plan_edit, require_space
from keelwright.weights.sources import AliasedSource, Excerpt, RenamedSource, innermost
from keelwright.weights.stream import CHUNK_ELEMENTS, can_split, copied_role, effective_reach, evaluate
from keelwright.weights.survey import with_survey

ROLE = "requantised"
"""The beginning of the name of the role that holds the new F8 weights; what follows tells edits apart."""

_E8M0_BIAS = 127


def plan_requantised(
    edit: WeightEdit,
    sources: Mapping[str, TensorSource],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    out: Path | None = None,
    digests: Mapping[str, str] | None = None,
    config_changes: Mapping[str, Any] | None = None,
    tied: bool = True,
    layout: TensorSource | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Return the plan of an edit whose output is stored in F8 as the layout's model is.

    What the edit asks of the whole model is asked here, because the scales depend on it. Such plans of several
    coefficients cannot be written in one sweep: each holds a source of its own.

    Args:
        edit, sources, max_shard_bytes, out, digests, config_changes, tied: As for `plan_edit`.
        layout: The model whose F8 formats the output has; by default that of the edit's last role.
        progress: Told about a survey.

    Raises:
        ConfigError: The layout's model is not stored in F8.
        ModelMismatchError: An F8 weight is not in the output, or has another shape there.
        KeelwrightError: Whatever `plan_edit` raises.
    """
    shown = layout or sources[edit.roles()[-1]]
    layout = _float8_of(shown)
    inner = plan_edit(
        edit, sources, max_shard_bytes=max_shard_bytes, digests=digests, config_changes=config_changes, tied=tied
    )
    planned = {one.entry.name: one for one in inner.tensors}
    _require_same_weights(layout, planned)
    surveyed = with_survey(edit, inner.sources, [one.entry for one in inner.tensors], progress=progress)
    source = RequantisedSource(surveyed, inner.sources, layout, {name: one.entry for name, one in planned.items()})
    made = source.entries()
    role = f"{ROLE}:{inner.digest.removeprefix('sha256:')[:12]}"
    whole = Requantised(surveyed, role, frozenset(made))
    entries = {**{name: one.entry for name, one in planned.items() if name not in made}, **made}
    tensors = tuple(Planned(entry, effective_reach(whole, entry)) for entry in entries.values())
    memory = inner.memory_bytes + source.memory_bytes()
    require_memory(memory, "This edit in F8")
    digest = json_digest([inner.digest, ROLE, sorted([one.name, one.dtype, list(one.shape)] for one in made.values())])
    shards = lay_out(entries.values(), max_shard_bytes=max_shard_bytes, metadata={"format": "pt", "keelwright": digest})
    changes = dict(inner.config_changes)
    if layout.settings is not None:
        changes["quantization_config"] = layout.settings
    count = sum(one.dtype in FLOAT8_DTYPES for one in made.values())
    plan = dataclasses.replace(
        inner,
        edit=whole,
        sources={role: source, **inner.sources},
        tensors=tensors,
        shards=shards,
        memory_bytes=memory,
        digest=digest,
        source_digests={role: inner.digest, **inner.source_digests},
        made=frozenset({role}),
        config_changes=changes,
        notes=(*inner.notes, f"{count} tensors are written in F8, with fresh scales where they change"),
    )
    if out is not None:
        require_space(plan, out)
    return plan


def _float8_of(source: TensorSource) -> Float8Checkpoint:
    found = innermost(source)
    if not isinstance(found, Float8Checkpoint):
        raise ConfigError(
            "There is no F8 format to write the output in.",
            expected="a tuned model whose weights are stored in F8",
            found=source.describe(),
            fix="leave --requantize out",
        )
    return found


def _require_same_weights(layout: Float8Checkpoint, planned: Mapping[str, Planned]) -> None:
    """Raise unless the output has the tensors of the model whose scales say how each is stored."""
    stored = layout.stored_entries()
    gone = [name for name in layout.entries() if name not in planned and stored[name].dtype in FLOAT8_DTYPES]
    new = [name for name in planned if name not in layout.entries() and name.endswith(".weight")]
    if gone or (new and any(_of_layer(name) for name in new)):
        raise ModelMismatchError(
            "The output does not have the tensors of the model whose F8 format it is to have.",
            expected=f"the layers of '{layout.describe()}', whose scales say how each weight is stored",
            found=f"no '{gone[0]}' in the output" if gone else f"'{new[0]}' besides",
            fix="leave --requantize out, or keep the number of layers",
        )


def _of_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


@dataclass(frozen=True, slots=True)
class Requantised(Edit):
    """An edit some of whose tensors are made by a source of their own, because each becomes weight and scales."""

    inner: WeightEdit
    role: str
    """The role of that source."""
    made: frozenset[str]
    """The tensors that it makes."""

    def roles(self) -> tuple[str, ...]:
        """Return the source's role and those of the edit; its last one still lays out the output."""
        return (self.role, *self.inner.roles())

    def reads(self, name: str) -> tuple[str, ...]:
        """Return the source's role alone for what it makes."""
        return (self.role,) if name in self.made else self.inner.reads(name)

    def reach(self, name: str) -> Reach:
        """Return COPY for what the source makes."""
        return Reach.COPY if name in self.made else self.inner.reach(name)

    def copies(self, name: str) -> str:
        """Return the source's role for what it makes."""
        return self.role if name in self.made else self.inner.copies(name)

    def passes(self, name: str) -> int:
        """Return the edit's own for everything else."""
        return 0 if name in self.made else self.inner.passes(name)

    def span(self, entry: TensorEntry, found: Found) -> tuple[int, int]:
        """Return the edit's own for everything else."""
        return (0, 0) if entry.name in self.made else self.inner.span(entry, found)

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return the edit's own statistics."""
        return self.inner.reduce(name, chunk, found)

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """Return what the edit makes of them."""
        return self.inner.settle(entry, sums, found)

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the edit's own values."""
        return self.inner.edit(name, chunk, found)

    def surveyed(self, found: Mapping[str, Found]) -> Self:
        """Return itself: the edit has seen the whole model."""
        return self

    def edit_of(self, name: str) -> WeightEdit:
        """Return the edit of a tensor that the source does not make."""
        return self.inner


class RequantisedSource:
    """What an edit makes of the F8 weights of a model: new F8 weights and their scales, computed as they are read.

    Args:
        edit: The edit, with nothing left to survey.
        sources: A source for each of its roles.
        layout: The model whose formats the output has.
        planned: The output's tensors as they would be without F8.

    Raises:
        ModelMismatchError: An F8 weight has another shape in the output.
    """

    def __init__(
        self,
        edit: WeightEdit,
        sources: Mapping[str, TensorSource],
        layout: Float8Checkpoint,
        planned: Mapping[str, TensorEntry],
    ) -> None:
        self._edit = edit
        self._sources = dict(sources)
        self._layout = layout
        self._entries: dict[str, TensorEntry] = {}
        self._weight_of: dict[str, str] = {}
        stored = layout.stored_entries()
        for name, entry in stored.items():
            if name in planned and entry.dtype in FLOAT8_DTYPES:
                self._add(entry, planned[name])
            elif name not in planned and name not in layout.entries() and name not in self._entries:
                self._entries[name] = entry
        self._scales: dict[str, Tensor] = {}
        self._whole: tuple[str, Tensor] | None = None
        self._recent: tuple[str, int, Tensor] | None = None

    def entries(self) -> Mapping[str, TensorEntry]:
        """Return the F8 weights, their scales, and what else stands beside them."""
        return self._entries

    def describe(self) -> str:
        """Return words for error texts."""
        return f"the edit of {self._layout.describe()}, in F8"

    def memory_bytes(self) -> int:
        """Return how much a read may take at most beside the edit itself."""
        whole = [
            one.elements
            for one in self._entries.values()
            if one.dtype in FLOAT8_DTYPES and not can_split(self._edit, _wide_entry(one))
        ]
        bands = [self._band_elements(name) for name in self._weight_of.values()]
        # In float32, with the magnitudes and the quotients beside the values.
        return 4 * max(whole, default=0) + 12 * max([CHUNK_ELEMENTS, *bands])

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start:stop`, in the dtype of the output."""
        weight = self._weight_of.get(name)
        if weight is not None:
            original = self._copied(weight)
            if original is not None:
                return original.read_stored(name, start, stop)
            scaling = self._layout.scalings[weight]
            return stored_scales(self._all_scales(scaling).reshape(-1)[start:stop], scaling.scale.dtype)
        if self._entries[name].dtype not in FLOAT8_DTYPES:
            return self._layout.read_stored(name, start, stop)
        original = self._copied(name)
        if original is not None:
            return original.read_stored(name, start, stop)
        return self._weights(name, start, stop)

    def __getstate__(self) -> dict[str, Any]:
        # What was computed stays here: another process computes what it needs.
        return {**self.__dict__, "_scales": {}, "_whole": None, "_recent": None}

    def _add(self, stored: TensorEntry, planned: TensorEntry) -> None:
        if stored.shape != planned.shape:
            raise ModelMismatchError(
                f"'{stored.name}' cannot be written in F8 as '{self._layout.describe()}' stores it.",
                expected=f"shape {list(stored.shape)}, which its scales belong to",
                found=f"shape {list(planned.shape)} in the output",
                fix="leave --requantize out, or keep the model's vocabulary",
            )
        self._entries[stored.name] = stored
        scaling = self._layout.scalings.get(stored.name)
        if scaling is not None:
            self._entries[scaling.scale.name] = scaling.scale
            self._weight_of[scaling.scale.name] = stored.name

    def _copied(self, name: str) -> Float8Checkpoint | None:
        """Return the model whose bytes are taken as they are, where the edit copies from one in the same format."""
        entry = _wide_entry(self._entries[name])
        if effective_reach(self._edit, entry) is not Reach.COPY:
            return None
        source = self._sources[copied_role(self._edit, entry)]
        while isinstance(source, AliasedSource | Excerpt) or (
            isinstance(source, RenamedSource) and source.names[name] == name
        ):
            source = source.inner
        same = isinstance(source, Float8Checkpoint) and source.scalings.get(name) == self._layout.scalings.get(name)
        return source if same and source.stored_entries()[name] == self._entries[name] else None  # type: ignore[attr-defined, return-value]

    def _weights(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements of one F8 weight."""
        entry = self._entries[name]
        scaling = self._layout.scalings.get(name)
        dtype = TORCH_DTYPES[entry.dtype]
        if scaling is None:
            return to_float8(self._wide(name, start, stop), None, dtype, name=name, offset=start)
        rows = _rows_per_band(scaling)
        if rows is None:
            wide = scales_of_range(scaling, self._all_scales(scaling), start, stop)
            return to_float8(self._wide(name, start, stop), wide, dtype, name=name, offset=start)
        columns = entry.shape[-1]
        first, last = _band_range(scaling, rows, start, stop)
        begin = first * columns
        recent = self._recent
        if recent is None or recent[0] != name or not recent[1] <= start <= stop <= recent[1] + recent[2].numel():
            values = self._wide(name, begin, last * columns)
            scales = torch.ones(scaling.grid).reshape(-1, scaling.grid[-1])
            lines = lines_of_rows(scaling, first, last)
            scales[lines.unique()] = fresh_scales(
                block_maxima(values.view(-1, columns), scaling, lines)[lines.unique()], entry.dtype, scaling.scale.dtype
            )
            wide = scales_of_range(scaling, scales.view(scaling.grid), begin, last * columns)
            quantised = to_float8(values, wide, dtype, name=name, offset=begin)
            recent = self._recent = (name, begin, quantised)
        return recent[2][start - recent[1] : stop - recent[1]].clone()

    def _all_scales(self, scaling: Scaling) -> Tensor:
        """Return the scales of a whole weight, as the numbers that their dtype can hold; shape of the grid."""
        entry = scaling.weight
        known = self._scales.get(entry.name)
        if known is None:
            columns = entry.shape[-1] if entry.shape else 1
            height = -(-entry.elements // max(1, columns))
            step = max(1, CHUNK_ELEMENTS // max(1, columns))
            shape = (scaling.grid[-1] if scaling.grid else 1,)
            maxima = torch.zeros(int(torch.tensor(scaling.grid).prod()) // max(1, shape[0]), *shape)
            for first in range(0, height, step):
                last = min(height, first + step)
                values = self._wide(entry.name, first * columns, last * columns).view(last - first, columns)
                maxima = torch.maximum(maxima, block_maxima(values, scaling, lines_of_rows(scaling, first, last)))
            known = fresh_scales(maxima, entry.dtype, scaling.scale.dtype).view(scaling.grid)
            self._scales = {entry.name: known}
        return known

    def _wide(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements of the edited weight in float32, not rounded."""
        entry = _wide_entry(self._entries[name])
        if can_split(self._edit, entry):
            parts = [part for _, part in evaluate(self._edit, self._sources, entry, span=(start, stop))]
            return torch.cat(parts) if parts else torch.empty(0)
        if self._whole is None or self._whole[0] != name:
            self._whole = None
            values = torch.empty(entry.elements)
            for offset, part in evaluate(self._edit, self._sources, entry):
                values[offset : offset + part.numel()] = part
            self._whole = (name, values)
        return self._whole[1][start:stop]

    def _band_elements(self, name: str) -> int:
        scaling = self._layout.scalings[name]
        rows = _rows_per_band(scaling)
        return 0 if rows is None else rows * scaling.weight.shape[-1]


def block_maxima(values: Tensor, scaling: Scaling, lines: Tensor) -> Tensor:
    """Return the largest magnitude in each block, over some rows; 0 where a block has none of them.

    Args:
        values: Rows of the weight, shape `[rows, columns]`.
        scaling: The blocks.
        lines: The row in the grid of each row.
    """
    count = scaling.grid[-1] if scaling.grid else 1
    width = scaling.block[-1] if scaling.block else 1
    padded = torch.nn.functional.pad(values.abs(), (0, count * width - values.shape[1]))
    per_row = padded.view(values.shape[0], count, width).amax(-1)
    out = torch.zeros(int(torch.tensor(scaling.grid).prod()) // max(1, count), count)
    return out.scatter_reduce(0, lines.unsqueeze(1).expand(-1, count), per_row, "amax")


def fresh_scales(maxima: Tensor, dtype: str, scale_dtype: str) -> Tensor:
    """Return a positive finite scale for each block, as a number that its dtype can hold, in float32.

    Args:
        maxima: Largest magnitude of each block.
        dtype: F8_E4M3 or F8_E5M2.
        scale_dtype: What the scale is stored in. Powers of two (F8_E8M0, and U8 for the same) are rounded up.
    """
    scales = torch.where(maxima > 0, maxima / largest(dtype), 1.0)
    if scale_dtype in ("F8_E8M0", "U8"):
        mantissa, exponent = torch.frexp(scales)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        return exponent.clamp(-_E8M0_BIAS + 1, _E8M0_BIAS).float().exp2()
    kind = TORCH_DTYPES[scale_dtype]
    limits = torch.finfo(torch.float32 if scale_dtype == "F64" else kind)
    return scales.clamp(limits.tiny, limits.max).to(kind).float()


def stored_scales(scales: Tensor, scale_dtype: str) -> Tensor:
    """Return scales as they are stored: numbers, or the exponents of powers of two."""
    if scale_dtype in ("F8_E8M0", "U8"):
        exponents = (scales.log2().round() + _E8M0_BIAS).to(torch.uint8)
        return exponents if scale_dtype == "U8" else exponents.view(TORCH_DTYPES[scale_dtype])
    return scales.to(TORCH_DTYPES[scale_dtype])


def to_float8(values: Tensor, scales: Tensor | None, dtype: torch.dtype, *, name: str, offset: int) -> Tensor:
    """Return values over their scales, rounded to nearest even in an F8 dtype.

    Args:
        values: A run of a weight, in float32.
        scales: The scale of each element; None where the format has none.
        dtype: The F8 dtype.
        name, offset: The tensor, and the index of the first element, for the error text.

    Raises:
        NumericalError: Without scales, a value lies beyond the format.
    """
    most = float(torch.finfo(dtype).max)
    if scales is None:
        beyond = (values.abs() > most).nonzero()
        if beyond.numel():
            first = int(beyond[0, 0])
            raise NumericalError(
                f"The edited weights do not fit F8: tensor '{name}', element {offset + first}.",
                expected=f"values up to {most:g}, as the model stores them without scales",
                found=f"{float(values[first]):g}",
                fix="leave --requantize out",
            )
        return values.to(dtype)
    # A scale in 16 bits may have been rounded down: the largest value then lies a little beyond the format.
    return (values / scales).clamp(-most, most).to(dtype)


def _wide_entry(entry: TensorEntry) -> TensorEntry:
    return TensorEntry(entry.name, "F32", entry.shape)


def _rows_per_band(scaling: Scaling) -> int | None:
    """Return how many rows share scales with no others; None where that is the whole weight."""
    if len(scaling.grid) < 2 or scaling.grid[-2] == 1 or any(one != 1 for one in scaling.block[:-2]):
        return None
    return scaling.block[-2]


def _band_range(scaling: Scaling, rows: int, start: int, stop: int) -> tuple[int, int]:
    """Return the rows of whole bands that hold the elements `start:stop`."""
    height, columns = scaling.weight.shape[-2:]
    first, last = start // columns, max(start // columns, (stop - 1) // columns)
    # Bands begin anew with every matrix of a stack.
    begin = first // height * height + first % height // rows * rows
    end = min(last // height * height + height, last // height * height + (last % height // rows + 1) * rows)
    return begin, end
