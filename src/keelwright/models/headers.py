# SPDX-License-Identifier: Apache-2.0
"""safetensors headers, read by ourselves: every lie is caught before a byte of data is used.

A file is eight bytes (little-endian length of the header), the header (JSON), then the data. The header gives each
tensor's dtype, shape and range of bytes. A file is accepted only when the ranges cover the data exactly: in order,
without holes, without overlap, to the last byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keelwright.core.errors import DataError, MissingError
from keelwright.core.protocols import TensorEntry

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "U16": 2,
    "I16": 2,
    "U32": 4,
    "I32": 4,
    "U64": 8,
    "I64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F16": 2,
    "BF16": 2,
    "F32": 4,
    "F64": 8,
    "C64": 8,
}
"""Bytes per element of each dtype that a header may name."""

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""Dtypes that weight arithmetic understands."""

FLOAT8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2"})
"""Dtypes of weights that stand for others, most often with a scale; see `models.float8`."""

# The limit of the safetensors library itself: a longer header is an attack on memory, not a model.
MAX_HEADER_BYTES = 100_000_000

_DAMAGED = "download or copy the file again; it is damaged, or was not written by safetensors"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies in its file."""

    entry: TensorEntry
    begin: int
    """First byte, counted from the start of the file."""
    end: int
    """One past the last byte."""


@dataclass(frozen=True, slots=True)
class Header:
    """One checked safetensors header."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    """By name, in the order of their bytes."""
    metadata: Mapping[str, str]
    data_start: int
    """First byte of data, counted from the start of the file."""
    file_bytes: int


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file; no tensor data is read.

    Args:
        path: The file.

    Raises:
        MissingError: There is no such file.
        DataError: The header is damaged, or disagrees with itself or with the size of the file.
    """
    if not path.is_file():
        raise MissingError(
            f"There is no file '{path}'.",
            expected="a safetensors file",
            found="a folder" if path.is_dir() else "nothing",
            fix="check the path, or download the checkpoint again",
        )
    file_bytes = path.stat().st_size
    with path.open("rb") as stream:
        length = _header_length(path, stream.read(8), file_bytes)
        raw = stream.read(length)
    rows = _parse(path, raw)
    metadata = rows.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "The header's __metadata__ is not text.", "a map from text to text", repr(metadata)[:80])
    data_start = 8 + length
    tensors = [_stored(path, name, row, data_start) for name, row in rows.items()]
    tensors.sort(key=lambda one: (one.begin, one.end))
    _require_exact_cover(path, tensors, data_start, file_bytes)
    return Header(path, {one.entry.name: one for one in tensors}, metadata, data_start, file_bytes)


def tensor_bytes(entry: TensorEntry) -> int:
    """Return the number of bytes that the tensor takes in a file."""
    return entry.elements * ITEM_BYTES[entry.dtype]


def _bad(path: Path, problem: str, expected: str, found: str) -> DataError:
    return DataError(f"'{path}': {problem}", expected=expected, found=found, fix=_DAMAGED)


def _header_length(path: Path, raw: bytes, file_bytes: int) -> int:
    if len(raw) < 8:
        raise _bad(path, "The file is too short for safetensors.", "at least 8 bytes", f"{len(raw)} bytes")
    length = int.from_bytes(raw, "little")
    if length > MAX_HEADER_BYTES:
        raise _bad(
            path,
            "The header's length is not believable.",
            f"at most {MAX_HEADER_BYTES:,} bytes",
            f"{length:,} bytes",
        )
    if 8 + length > file_bytes:
        raise _bad(
            path,
            "The file ends inside its header.",
            f"at least {8 + length:,} bytes, as its first 8 bytes say",
            f"{file_bytes:,} bytes",
        )
    return length


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise _bad(path, f"The header names '{key}' twice.", "each name once", f"two entries '{key}'")
            seen[key] = value
        return seen

    try:
        rows = json.loads(raw.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _bad(path, "The header is not JSON.", "a JSON object", str(error)) from error
    if not isinstance(rows, dict):
        raise _bad(path, "The header is not a JSON object.", "a JSON object", type(rows).__name__)
    return rows


def _stored(path: Path, name: str, row: Any, data_start: int) -> StoredTensor:
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        found = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise _bad(path, f"The entry of tensor '{name}' is malformed.", "dtype, shape and data_offsets", found or "{}")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _bad(path, f"Tensor '{name}' has an unknown dtype.", f"one of {', '.join(ITEM_BYTES)}", repr(dtype))
    if not _are_sizes(shape):
        raise _bad(path, f"Tensor '{name}' has an impossible shape.", "a list of sizes, 0 or more", repr(shape)[:80])
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(
            path, f"Tensor '{name}' has an impossible range of bytes.", "[begin, end], begin <= end", repr(offsets)[:80]
        )
    begin, end = offsets
    wanted = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != wanted:
        raise _bad(
            path,
            f"Tensor '{name}' does not fit its range of bytes.",
            f"{wanted:,} bytes for {dtype} {shape}",
            f"{end - begin:,} bytes",
        )
    return StoredTensor(TensorEntry(name, dtype, tuple(shape)), data_start + begin, data_start + end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _require_exact_cover(path: Path, tensors: list[StoredTensor], data_start: int, file_bytes: int) -> None:
    position = data_start
    for one in tensors:
        if one.begin != position:
            kind = "overlaps the tensor before it" if one.begin < position else "leaves a hole before it"
            raise _bad(
                path,
                f"Tensor '{one.entry.name}' {kind}.",
                f"data from byte {position - data_start:,}",
                f"data from byte {one.begin - data_start:,}",
            )
        position = one.end
    if position != file_bytes:
        kind = "is cut short" if position > file_bytes else "has bytes that no tensor owns"
        last = f" (the last tensor is '{tensors[-1].entry.name}')" if tensors else ""
        raise _bad(path, f"The file {kind}{last}.", f"{position:,} bytes", f"{file_bytes:,} bytes")
