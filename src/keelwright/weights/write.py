# SPDX-License-Identifier: Apache-2.0
"""Write an edit as a checkpoint folder: whole or not at all, resumable, with a digest for every file.

Everything is built in `OUT.partial/` and renamed at the end. All headers go first and every tensor has a fixed
place, so tensors can be written in any order and an interrupted write goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from keelwright.core.errors import DataError, NumericalError, StorageError
from keelwright.core.files import storage_errors, sync_folder, write_atomic
from keelwright.core.protocols import Progress, Silent
from keelwright.models.folders import INDEX
from keelwright.weights.card import Provenance, model_card
from keelwright.weights.companions import copy_companions, dominant_dtype
from keelwright.weights.journal import (
    JOURNAL_FILE,
    PLAN_FILE,
    Journal,
    begin,
    output_place,
    partial_folder,
    read_journal,
)
from keelwright.weights.layout import Shard, Slot, index_json
from keelwright.weights.lock import LOCK_FILE, lock_text
from keelwright.weights.plan import Plan, require_space
from keelwright.weights.sources import file_stamps
from keelwright.weights.stream import CHUNK_ELEMENTS, as_bytes, evaluate

_READ_BLOCK = 1 << 20
# Chunks that may wait for the thread that hashes and writes; more would only take memory.
_QUEUE = 4


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was written."""

    folder: Path
    files: Mapping[str, str]
    """SHA-256 of every file but the lock itself, by name."""
    tensors: int
    bytes: int
    """Bytes of the weight files."""
    seconds: float
    resumed: int = 0
    """Tensors that an earlier, interrupted write had finished."""
    notes: tuple[str, ...] = field(default=())


def materialise(
    plan: Plan,
    out: Path,
    *,
    companions_from: Path,
    tokenizer_from: Path | None = None,
    provenance: Provenance | None = None,
    progress: Progress | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Manifest:
    """Write the plan's checkpoint to `out`.

    Args:
        plan: What to write.
        out: The folder; must not exist, or be empty. Built as `OUT.partial`, renamed when complete.
        companions_from: The folder whose config and generation settings are copied.
        tokenizer_from: The folder whose tokenizer and chat template are copied; by default the same.
        provenance: What the lock file and the model card say about the edit.
        progress: Told about every tensor, in bytes.
        chunk_elements: Elements evaluated at a time. Changes memory and speed, never the bytes.

    Raises:
        StorageError: The disk is full or read-only, or the folder is in use. What is finished stays in
            `OUT.partial`, and the same call resumes it.
        NumericalError: An input holds NaN or infinity, or a value does not fit the output's dtype.
        DataError: An input changed since the plan was made. Nothing is kept then, nor after a NumericalError.
    """
    started = time.monotonic()
    progress = progress or Silent()
    provenance = provenance or Provenance(method=type(plan.edit).__name__.lower())
    summary = {"method": provenance.method, "coefficients": dict(provenance.coefficients)}
    partial = begin(out, digest=plan.digest, summary=summary)
    with _kept(partial):
        require_space(plan, out)
        files, resumed = _write_shards(plan, partial, progress, chunk_elements)
        for text in plan.notes:
            progress.note(text)
        changes = {**plan.config_changes, "dtype": dominant_dtype(one.entry for one in plan.tensors)}
        files.update(copy_companions(companions_from, tokenizer_from or companions_from, partial, changes))
        index = index_json(plan.shards)
        if index is not None:
            files[INDEX] = write_text(partial / INDEX, index)
        files["README.md"] = write_text(partial / "README.md", model_card(provenance, _sources(plan), plan.notes))
        _require_unchanged(plan)
        seconds = time.monotonic() - started
        manifest = Manifest(out, files, len(plan.tensors), plan.total_bytes, seconds, resumed, plan.notes)
        facts = {"tensors": manifest.tensors, "bytes": manifest.bytes, "seconds": seconds, "notes": list(plan.notes)}
        write_atomic(
            partial / LOCK_FILE,
            lock_text(provenance, _sources(plan), plan_digest=plan.digest, files=files, facts=facts),
        )
        finish(partial, out)
    return manifest


def write_text(path: Path, text: str) -> str:
    """Write a small file durably and return its SHA-256."""
    write_atomic(path, text)
    return hashlib.sha256(text.encode()).hexdigest()


def finish(partial: Path, out: Path) -> None:
    """Give the complete partial folder its name."""
    place = output_place(out)
    sync_folder(partial)
    if place.is_dir():
        place.rmdir()
    partial.rename(place)
    sync_folder(place.absolute().parent)
    # Only now: a kill before the rename must find what it needs to resume.
    for name in (JOURNAL_FILE, PLAN_FILE):
        (place / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _kept(partial: Path) -> Iterator[None]:
    """Keep the finished part when the machine failed, and say so; drop it when an input is wrong."""
    try:
        with storage_errors(partial):
            yield
    except StorageError as error:
        raise StorageError(
            error.problem,
            expected=error.expected,
            found=error.found,
            fix=f"{error.fix}; finished tensors are kept in '{partial}', and the same command resumes from them",
        ) from error
    except (NumericalError, DataError):
        # No corrected input has this plan's digest, so nothing could ever resume from it.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.EIO, errno.ENOTEMPTY):
            raise
        raise StorageError(
            f"'{partial}' could not be written.",
            expected="a disk that takes the whole output",
            found=os.strerror(error.errno),
            fix=f"run the same command again: finished tensors are kept in '{partial}' and it resumes from them",
        ) from error


def _require_unchanged(plan: Plan) -> None:
    for source in plan.sources.values():
        for path, stamp in file_stamps(source).items():
            if stamp != plan.stamps.get(path):
                raise DataError(
                    f"'{path}' was changed while it was read.",
                    expected="the same file from the plan to the end",
                    found="another size or time of change",
                    fix="do not change a checkpoint while it is in use; run the command again",
                )


def _sources(plan: Plan) -> dict[str, dict[str, str]]:
    return {
        role: {"model": source.describe(), "digest": plan.source_digests[role]} for role, source in plan.sources.items()
    }


def _write_shards(plan: Plan, partial: Path, progress: Progress, chunk_elements: int) -> tuple[dict[str, str], int]:
    """Write all weight files; return their SHA-256 and how many tensors were there already."""
    finished = read_journal(partial)
    progress.stage("write", total=plan.data_bytes, unit="B")
    handles = {shard.file: _open_shard(partial / shard.file, shard) for shard in plan.shards}
    files: dict[str, str] = {}
    resumed = 0
    try:
        with Journal(partial) as journal, ThreadPoolExecutor(max_workers=1) as pool:
            for shard in plan.shards:
                writer = _ShardWriter(handles[shard.file], shard, pool)
                for slot in shard.slots:
                    if writer.verify(slot, finished.get(slot.entry.name)):
                        resumed += 1
                    else:
                        chunks = evaluate(plan.edit, plan.sources, slot.entry.name, chunk_elements=chunk_elements)
                        journal.append(slot.entry.name, writer.write(slot, chunks))
                    progress.advance(slot.end - slot.begin)
                files[shard.file] = writer.close()
    finally:
        for handle in handles.values():
            os.close(handle)
    return files, resumed


def _open_shard(path: Path, shard: Shard) -> int:
    """Return a handle on a file of its final size with its header in place."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.fstat(handle).st_size != shard.size:
            os.ftruncate(handle, shard.size)
        # Reserving the room now makes a full disk fail at the start, not after an hour.
        if hasattr(os, "posix_fallocate"):
            _reserve(handle, shard.size)
        _write_at(handle, memoryview(shard.header), 0)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _reserve(handle: int, size: int) -> None:
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        # Some network file systems cannot; the write itself then tells whether there is room.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_at(handle: int, view: memoryview, position: int) -> None:
    written = 0
    while written < len(view):
        written += os.pwrite(handle, view[written:], position + written)


class _ShardWriter:
    """Writes one file's tensors in the order of their bytes, hashing in a second thread.

    A tensor's digest covers the file up to the tensor's end: one hash then serves the journal and the lock file.
    """

    def __init__(self, handle: int, shard: Shard, pool: ThreadPoolExecutor) -> None:
        self._handle = handle
        self._pool = pool
        self._file = hashlib.sha256(shard.header)

    def verify(self, slot: Slot, expected: str | None) -> bool:
        """Tell whether the file up to the end of the tensor has the digest that the journal gives."""
        if expected is None:
            return False
        file = self._file.copy()
        position = slot.begin
        while position < slot.end:
            block = os.pread(self._handle, min(_READ_BLOCK, slot.end - position), position)
            if not block:
                return False
            file.update(block)
            position += len(block)
        if file.hexdigest() != expected:
            return False
        self._file = file
        return True

    def write(self, slot: Slot, chunks: Iterator[tuple[int, Tensor]]) -> str:
        """Write a tensor from its chunks and return the SHA-256 of the file up to its end."""
        waiting: deque[Future[None]] = deque()

        def put(values: Tensor, position: int) -> None:
            view = as_bytes(values)
            _write_at(self._handle, view, position)
            self._file.update(view)

        for offset, values in chunks:
            waiting.append(self._pool.submit(put, values, slot.begin + offset * values.element_size()))
            if len(waiting) > _QUEUE:
                waiting.popleft().result()
        for future in waiting:
            future.result()
        return self._file.hexdigest()

    def close(self) -> str:
        """Make the file durable and return the SHA-256 of all its bytes."""
        os.fsync(self._handle)
        return self._file.hexdigest()


__all__ = ["Manifest", "finish", "materialise", "partial_folder", "write_text"]
