# SPDX-License-Identifier: Apache-2.0
"""Where every tensor goes in the output files, decided before a byte is written, and the headers that say so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from keelwright.core.protocols import TensorEntry
from keelwright.models.folders import WEIGHTS
from keelwright.models.headers import tensor_bytes

# Inside a file the safetensors library sorts by dtype, widest first, then by name. Doing the same makes our files
# equal to the library's, byte for byte.
_DTYPE_ORDER = (
    "U64",
    "I64",
    "F64",
    "C64",
    "F32",
    "U32",
    "I32",
    "BF16",
    "F16",
    "U16",
    "I16",
    "F8_E8M0",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "BOOL",
)


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor's place in its file."""

    entry: TensorEntry
    begin: int
    """First byte, counted from the start of the file."""
    end: int
    """One past the last byte."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file."""

    file: str
    header: bytes
    """Length prefix and padded JSON: everything before the data."""
    slots: tuple[Slot, ...]
    """In the order of their bytes."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.slots[-1].end if self.slots else len(self.header)


def lay_out(entries: Iterable[TensorEntry], *, max_shard_bytes: int, metadata: Mapping[str, str]) -> tuple[Shard, ...]:
    """Return the output files for some tensors.

    Tensors fill the files in the natural order of their names (layer 2 before layer 10), so the result does not
    depend on how any input was cut. A tensor larger than the limit gets a file of its own.

    Args:
        entries: The output's tensors.
        max_shard_bytes: Most bytes of data per file.
        metadata: The text map that every header carries.
    """
    groups: list[list[TensorEntry]] = [[]]
    room = max_shard_bytes
    for entry in sorted(entries, key=lambda one: natural_key(one.name)):
        size = tensor_bytes(entry)
        if groups[-1] and size > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(entry)
        room -= size
    count = len(groups)
    names = [WEIGHTS] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return tuple(build_shard(name, group, metadata) for name, group in zip(names, groups, strict=True))


def build_shard(file: str, entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> Shard:
    """Return the layout of one file that holds exactly `entries`."""
    ordered = sorted(entries, key=lambda one: (_DTYPE_ORDER.index(one.dtype), one.name.encode()))
    rows: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    places: list[tuple[TensorEntry, int, int]] = []
    for entry in ordered:
        end = position + tensor_bytes(entry)
        rows[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
        places.append((entry, position, end))
        position = end
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    slots = tuple(Slot(entry, len(header) + begin, len(header) + end) for entry, begin, end in places)
    return Shard(file, header, slots)


def index_json(shards: tuple[Shard, ...]) -> str | None:
    """Return the text of `model.safetensors.index.json`, or None for a single file."""
    if len(shards) == 1:
        return None
    weight_map = {slot.entry.name: shard.file for shard in shards for slot in shard.slots}
    size = sum(slot.end - slot.begin for shard in shards for slot in shard.slots)
    parameters = sum(slot.entry.elements for shard in shards for slot in shard.slots)
    metadata = {"total_parameters": parameters, "total_size": size}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that puts layer 2 before layer 10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)
