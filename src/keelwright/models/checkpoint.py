# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder as named tensors: headers first, values in ranges, nothing mapped and nothing unpickled."""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keelwright.core.errors import DataError, MissingError
from keelwright.core.protocols import TensorEntry
from keelwright.models.dtypes import TORCH_DTYPES
from keelwright.models.folders import (
    INDEX,
    WEIGHTS,
    float8_settings,
    read_json,
    require_checkpoint,
    require_inside,
    require_unquantised,
    shown_files,
)
from keelwright.models.headers import ITEM_BYTES, Header, read_header

WHOLE_DIGEST_BYTES = 1_000_000_000
"""Up to this size a digest covers every byte; above it, headers and samples."""

_BLOCK = 1 << 20
_SAMPLES = 64


class Checkpoint:
    """A `TensorSource` over `model.safetensors`, alone or sharded.

    Args:
        folder: The folder.
        text: The user's own words for it, for error texts.

    Raises:
        MissingError: No such folder, no weights in it, or a shard is missing.
        ConfigError: The folder is an adapter.
        UnsafeInputError: Only pickled weights, or an index that names files outside the folder.
        DataError: A header lies, the index disagrees with the shards, or the weights are quantised.
    """

    def __init__(self, folder: Path, text: str | None = None) -> None:
        self.folder = folder
        self._text = text or str(folder)
        require_checkpoint(folder, self._text)
        self._config = read_json(folder / "config.json", self._text)
        if float8_settings(self._config) is None:
            require_unquantised(folder, self._config, self._text)
        self._headers, self._owner = _open_headers(folder, self._text)
        self._entries = {name: header.tensors[name].entry for name, header in self._owner.items()}
        self._handles: dict[Path, int] = {}
        self._opening = threading.Lock()
        self._finalizer = weakref.finalize(self, _close, self._handles)

    def __reduce__(self) -> tuple[type[Checkpoint], tuple[Path, str]]:
        # Handles belong to one process: another one opens the folder again.
        return (Checkpoint, (self.folder, self._text))

    def entries(self) -> Mapping[str, TensorEntry]:
        """Return every tensor, in the order of the files."""
        return self._entries

    def describe(self) -> str:
        """Return the user's own words for the checkpoint."""
        return self._text

    def config_json(self) -> dict[str, Any]:
        """Return `config.json`."""
        return dict(self._config)

    def headers(self) -> tuple[Header, ...]:
        """Return the checked header of each file, in the order of their names."""
        return self._headers

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start:stop` of the flattened tensor, in the stored dtype: a fresh 1-D tensor.

        Raises:
            DataError: The file became shorter since its header was read, or torch lacks the dtype.
        """
        entry = self._entries[name]
        if entry.dtype not in TORCH_DTYPES:
            raise DataError(
                f"Tensor '{name}' of '{self._text}' cannot be read.",
                expected=f"one of {', '.join(TORCH_DTYPES)}",
                found=entry.dtype,
                fix="use an unquantised model",
            )
        return self.read_bytes(name, start, stop).view(TORCH_DTYPES[entry.dtype])

    def read_bytes(self, name: str, start: int, stop: int) -> Tensor:
        """Return the bytes of elements `start:stop` of the flattened tensor, of whatever dtype.

        Raises:
            DataError: The file became shorter since its header was read.
        """
        header = self._owner[name]
        stored = header.tensors[name]
        entry = stored.entry
        if not 0 <= start <= stop <= entry.elements:
            raise IndexError(f"elements {start}:{stop} of '{name}', which has {entry.elements}")
        item = ITEM_BYTES[entry.dtype]
        raw = torch.empty((stop - start) * item, dtype=torch.uint8)
        self._fill(header.path, raw.numpy().data, stored.begin + start * item)
        return raw

    def data_digest(self) -> str:
        """Return the digest of the weights that `weights_digest` defines."""
        return weights_digest(self._headers)

    def close(self) -> None:
        """Close the files; reading opens them again."""
        _close(self._handles)

    def _fill(self, path: Path, view: memoryview, position: int) -> None:
        handle = self._handles.get(path)
        if handle is None:
            with self._opening:  # several threads may read at once
                handle = self._handles.get(path)
                if handle is None:
                    handle = self._handles[path] = os.open(path, os.O_RDONLY)
        filled = 0
        while filled < len(view):
            got = os.preadv(handle, [view[filled:]], position + filled)
            if got == 0:
                raise DataError(
                    f"'{path}' became shorter while it was read.",
                    expected=f"{position + len(view):,} bytes or more",
                    found=f"{position + filled:,} bytes",
                    fix="do not change a checkpoint while it is in use; run the command again",
                )
            filled += got


def weights_digest(headers: Sequence[Header]) -> str:
    """Return a digest of weight files: `sha256:` of every byte, or `sampled-sha256:` for 1 GB and more.

    The sampled digest covers every header and 64 blocks of 1 MiB spread over each file. It tells checkpoints apart; it
    does not prove that no byte was changed.
    """
    whole = sum(header.file_bytes for header in headers) < WHOLE_DIGEST_BYTES
    digest = hashlib.sha256()
    for header in headers:
        digest.update(f"{header.path.name}\x1f{header.file_bytes}\x1f".encode())
        with header.path.open("rb") as stream:
            if whole:
                while block := stream.read(_BLOCK):
                    digest.update(block)
                continue
            digest.update(stream.read(header.data_start))
            span = max(0, header.file_bytes - header.data_start - _BLOCK)
            for index in range(_SAMPLES):
                stream.seek(header.data_start + span * index // (_SAMPLES - 1))
                digest.update(stream.read(_BLOCK))
    return f"{'sha256' if whole else 'sampled-sha256'}:{digest.hexdigest()}"


def _close(handles: dict[Path, int]) -> None:
    while handles:
        os.close(handles.popitem()[1])


def _open_headers(folder: Path, text: str) -> tuple[tuple[Header, ...], dict[str, Header]]:
    """Return the headers, and for each tensor the header of the file that holds it."""
    if (folder / WEIGHTS).is_file():
        header = read_header(folder / WEIGHTS)
        return (header,), dict.fromkeys(header.tensors, header)
    index = folder / INDEX
    weight_map = read_json(index, text).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise DataError(
            f"'{index}' has no weight_map.",
            expected="a map from tensor name to file name",
            found=type(weight_map).__name__,
            fix="download or copy the index again",
        )
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        require_inside(shard, index)
        if not (folder / shard).is_file():
            raise MissingError(
                f"'{text}' lacks the shard '{shard}'.",
                expected=f"{len(shards)} shards, as {INDEX} lists them",
                found=shown_files(folder),
                fix="download or copy the missing shard",
            )
    headers = {shard: read_header(folder / shard) for shard in shards}
    _require_agreement(index, weight_map, headers)
    owner = {name: header for header in headers.values() for name in header.tensors}
    return tuple(headers.values()), owner


def _require_agreement(index: Path, weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    for name, shard in weight_map.items():
        if name not in headers[shard].tensors:
            raise DataError(
                f"'{index}' lists a tensor that its shard does not hold.",
                expected=f"'{name}' in {shard}",
                found=f"{len(headers[shard].tensors)} other tensors there",
                fix="download or copy the index and the shard again",
            )
    for shard, header in headers.items():
        for name in header.tensors:
            if weight_map.get(name) != shard:
                raise DataError(
                    f"'{index.parent / shard}' holds a tensor that the index does not place there.",
                    expected=f"'{name}' in {weight_map.get(name, 'no file')}, as {INDEX} says",
                    found=f"'{name}' in {shard}",
                    fix="download or copy the index and the shard again",
                )
