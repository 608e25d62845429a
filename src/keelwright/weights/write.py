# SPDX-License-Identifier: Apache-2.0
"""Write an edit as a checkpoint folder: whole or not at all, resumable, with a digest for every file.

Everything is built in `OUT.partial/` and renamed at the end. All headers go first and every tensor has a fixed
place, so tensors can be written in any order and an interrupted write goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import DataError, NumericalError, StorageError
from keelwright.core.files import flush_behind, storage_errors, sync_folder, write_atomic
from keelwright.core.protocols import Progress, Silent
from keelwright.models.folders import INDEX
from keelwright.weights.card import Provenance, model_card
from keelwright.weights.companions import copy_companions, dominant_dtype
from keelwright.weights.facts import Facts, collector, notes_on, summary
from keelwright.weights.journal import (
    JOURNAL_FILE,
    PLAN_FILE,
    Journal,
    begin,
    output_place,
    read_journal,
    sole_writer,
)
from keelwright.weights.layout import Shard, Slot, index_json
from keelwright.weights.lock import LOCK_FILE, lock_text
from keelwright.weights.numerics import ROUNDING
from keelwright.weights.plan import Plan, require_space
from keelwright.weights.sources import file_stamps
from keelwright.weights.stream import CHUNK_ELEMENTS, as_bytes, evaluate
from keelwright.weights.survey import with_survey
from keelwright.weights.workers import (
    EXECUTORS,
    ExecutorName,
    Target,
    Work,
    default_workers,
    keep_freed_memory,
    run_tasks,
    tasks_of,
    write_at,
)

_READ_BLOCK = 8 << 20
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


@dataclass(frozen=True, slots=True)
class Effort:
    """How much of the machine a write may use; none of it changes a byte."""

    workers: int | None = None
    """Processes or tasks at work; None: one per core, one for small outputs."""
    executor: ExecutorName = "processes"
    chunk_elements: int = CHUNK_ELEMENTS
    """Elements evaluated at a time."""


def effort_of(workers: int | None, executor: str) -> Effort:
    """Return the effort that a person asked for.

    Raises:
        ConfigError: There is no such executor, or less than one worker.
    """
    require_choice("executor", executor, EXECUTORS)
    if workers is not None:
        require_in_range("workers", workers, low=1)
    return Effort(workers, next(one for one in EXECUTORS if one == executor))


def materialise(
    plan: Plan,
    out: Path,
    *,
    companions_from: Path,
    tokenizer_from: Path | None = None,
    provenance: Provenance | None = None,
    progress: Progress | None = None,
    effort: Effort | None = None,
) -> Manifest:
    """Write the plan's checkpoint to `out`.

    Args:
        plan: What to write.
        out: The folder; must not exist, or be empty. Built as `OUT.partial`, renamed when complete.
        companions_from: The folder whose config and generation settings are copied.
        tokenizer_from: The folder whose tokenizer and chat template are copied; by default the same.
        provenance: What the lock file and the model card say about the edit.
        progress: Told about every tensor, in bytes.
        effort: How much of the machine to use.

    Raises:
        StorageError: The disk is full or read-only, or the folder is in use. What is finished stays in
            `OUT.partial`, and the same call resumes it.
        NumericalError: An input holds NaN or infinity, or a value does not fit the output's dtype.
        DataError: An input changed since the plan was made. Nothing is kept then, nor after a NumericalError.
    """
    return materialise_sweep(
        [plan],
        [out],
        companions_from=companions_from,
        tokenizer_from=tokenizer_from,
        provenances=[provenance or Provenance(method=type(plan.edit).__name__.lower())],
        progress=progress,
        effort=effort,
    )[0]


def materialise_sweep(
    plans: Sequence[Plan],
    outs: Sequence[Path],
    *,
    companions_from: Path,
    tokenizer_from: Path | None = None,
    provenances: Sequence[Provenance],
    progress: Progress | None = None,
    effort: Effort | None = None,
) -> list[Manifest]:
    """Write several plans over the same models from one reading of them, for example one method's coefficients.

    Args:
        plans: What to write; all with the same sources and the same tensors.
        outs: A folder for each.
        companions_from, tokenizer_from: As for `materialise`.
        provenances: For each, what its lock file and card say.
        progress: Told about every tensor, in bytes of all outputs.
        effort: How much of the machine to use.

    Raises:
        StorageError, NumericalError, DataError: As for `materialise`; then no output gets its name.
    """
    started = time.monotonic()
    progress, effort = progress or Silent(), effort or Effort()
    partials = []
    for plan, out, provenance in zip(plans, outs, provenances, strict=True):
        summary = {"method": provenance.method, "coefficients": dict(provenance.coefficients)}
        partials.append(begin(out, digest=plan.digest, summary=summary))
    manifests = []
    with contextlib.ExitStack() as stack:
        for partial in partials:
            stack.enter_context(sole_writer(partial))
            stack.enter_context(_kept(partial))
        for plan, out in zip(plans, outs, strict=True):
            require_space(plan, out)
        written, told, resumed = _write_shards(plans, partials, progress, effort)
        for plan in plans:
            _require_unchanged(plan)
        for number, (plan, out, partial, provenance) in enumerate(zip(plans, outs, partials, provenances, strict=True)):
            rows = [facts for target, _, facts in told if target == number]
            notes = (*plan.notes, *notes_on(rows, provenance.method))
            for text in notes:
                progress.note(text)
            files = written[number]
            files.update(_write_companions(plan, partial, companions_from, tokenizer_from or companions_from))
            files["README.md"] = write_text(partial / "README.md", model_card(provenance, _sources(plan), notes))
            seconds = time.monotonic() - started
            manifest = Manifest(out, files, len(plan.tensors), plan.total_bytes, seconds, resumed, notes)
            write_atomic(partial / LOCK_FILE, _lock(plan, provenance, manifest, rows))
            manifests.append(manifest)
        for partial, out in zip(partials, outs, strict=True):
            finish(partial, out)
    return manifests


def _write_companions(plan: Plan, partial: Path, model_folder: Path, tokenizer_folder: Path) -> dict[str, str]:
    """Write what a loader needs beside the weights; return the SHA-256 of each file."""
    changes = {**plan.config_changes, "dtype": dominant_dtype(one.entry for one in plan.tensors)}
    files = copy_companions(model_folder, tokenizer_folder, partial, changes, plan.generation_changes)
    index = index_json(plan.shards)
    if index is not None:
        files[INDEX] = write_text(partial / INDEX, index)
    return files


def _lock(plan: Plan, provenance: Provenance, manifest: Manifest, rows: Sequence[Mapping[str, float]]) -> str:
    facts = {
        "tensors": manifest.tensors,
        "bytes": manifest.bytes,
        "seconds": manifest.seconds,
        "notes": list(manifest.notes),
        # Tensors that an earlier, interrupted write had finished told their facts to that one.
        **({"facts": summary(rows)} if rows else {}),
    }
    seed = plan.rounding_seed
    return lock_text(
        provenance,
        _sources(plan),
        plan_digest=plan.digest,
        files=manifest.files,
        facts=facts,
        rounding=ROUNDING if seed is None else f"float32 evaluation, one stochastic rounding, seed {seed}",
    )


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
        role: {"model": source.describe(), "digest": plan.source_digests[role]}
        for role, source in plan.sources.items()
        if role not in plan.made
    }


def _write_shards(
    plans: Sequence[Plan], partials: Sequence[Path], progress: Progress, effort: Effort
) -> tuple[list[dict[str, str]], Facts, int]:
    """Write all weight files; return their SHA-256 for each plan, facts, and how many tensors were there already."""
    edits = [
        with_survey(plan.edit, plan.sources, [one.entry for one in plan.tensors], progress=progress) for plan in plans
    ]
    targets = tuple(
        Target(edit, partial, plan.shards) for edit, partial, plan in zip(edits, partials, plans, strict=True)
    )
    work = Work(targets, plans[0].sources, effort.chunk_elements, plans[0].rounding_seed)
    total = sum(plan.data_bytes for plan in plans)
    keep_freed_memory()
    progress.stage("write", total=total, unit="B")
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(_Output(partial, plan.shards)) for partial, plan in zip(partials, plans, strict=True)
        ]
        resumed = _accept_finished(writers, progress)
        workers = effort.workers or default_workers(total)
        if workers == 1 and len(plans) == 1 and effort.executor == "processes":
            facts = _write_alone(work, writers[0], progress)
        else:
            facts = _write_together(work, writers, progress, effort.executor, workers)
        return [writer.close() for writer in writers], facts, resumed


def _accept_finished(writers: Sequence[_Output], progress: Progress) -> int:
    """Step over the tensors that an earlier write finished in every output; return how many those are."""
    finished = [read_journal(writer.folder) for writer in writers]
    torn: set[int] = set()
    count = 0
    for shard, slot in writers[0].order:
        name = writers[0].shards[shard].slots[slot].entry.name
        if shard in torn:
            continue
        hashes = [writer.verified(shard, slot, one.get(name)) for writer, one in zip(writers, finished, strict=True)]
        if None in hashes:
            torn.add(shard)
            continue
        for writer, found in zip(writers, hashes, strict=True):
            writer.accept(shard, slot, found)
            progress.advance(writer.size(shard, slot))
        count += 1
    return count


def _write_alone(work: Work, writer: _Output, progress: Progress) -> Facts:
    """Evaluate in this process, hashing and writing in a second thread; return what the edit tells."""
    edit = work.targets[0].edit
    facts: Facts = []
    with ThreadPoolExecutor(max_workers=1) as pool:
        for shard, slot in writer.left():
            entry = writer.shards[shard].slots[slot].entry
            chunks = evaluate(
                edit,
                work.sources,
                entry,
                chunk_elements=work.chunk_elements,
                rounding_seed=work.rounding_seed,
                reduced=collector([edit], entry.name, facts),
            )
            writer.write(shard, slot, chunks, pool)
            progress.advance(writer.size(shard, slot))
    return facts


def _write_together(
    work: Work, writers: Sequence[_Output], progress: Progress, executor: ExecutorName, workers: int
) -> Facts:
    """Let workers evaluate and write; read what is complete back in the order of the files, for its digest."""
    facts: Facts = []
    left = writers[0].left()
    tasks = tasks_of(work, left)
    pieces_left = Counter((piece.shard, piece.slot) for task in tasks for piece in task)
    front = 0
    for number, told in run_tasks(work, tasks, executor=executor, workers=workers):
        facts += told
        for piece in tasks[number]:
            pieces_left[piece.shard, piece.slot] -= 1
        while front < len(left) and pieces_left[left[front]] == 0:
            for writer in writers:
                writer.adopt(*left[front])
                progress.advance(writer.size(*left[front]))
            front += 1
    return facts


def _open_shard(path: Path, shard: Shard) -> int:
    """Return a handle on a file of its final size with its header in place."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.fstat(handle).st_size != shard.size:
            os.ftruncate(handle, shard.size)
        # Reserving the room now makes a full disk fail at the start, not after an hour.
        if hasattr(os, "posix_fallocate"):
            _reserve(handle, shard.size)
        write_at(handle, memoryview(shard.header), 0)
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


class _Output:
    """The weight files of one output: their handles, their hashes so far, and the journal.

    A tensor's digest covers its file up to the tensor's end: one hash then serves the journal and the lock file. So
    tensors are taken into the hash in the order of their bytes, whoever wrote them and when.
    """

    def __init__(self, folder: Path, shards: tuple[Shard, ...]) -> None:
        self.folder = folder
        self.shards = shards
        self.order = [(number, slot) for number, shard in enumerate(shards) for slot in range(len(shard.slots))]
        self._hashes = [hashlib.sha256(shard.header) for shard in shards]
        self._done: set[tuple[int, int]] = set()

    def __enter__(self) -> _Output:
        with contextlib.ExitStack() as stack:
            self._handles = []
            for shard in self.shards:
                self._handles.append(_open_shard(self.folder / shard.file, shard))
                stack.callback(os.close, self._handles[-1])
            self._journal = stack.enter_context(Journal(self.folder))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def left(self) -> list[tuple[int, int]]:
        """Return the tensors that are not in the hash yet, as indices of shard and slot."""
        return [place for place in self.order if place not in self._done]

    def size(self, shard: int, slot: int) -> int:
        """Return the bytes of a tensor."""
        place = self.shards[shard].slots[slot]
        return place.end - place.begin

    def verified(self, shard: int, slot: int, expected: str | None) -> hashlib._Hash | None:
        """Return the file's hash up to the end of the next tensor, where it is the one that the journal gives."""
        found = self._hashes[shard].copy()
        if expected is None or not self._read_back(self.shards[shard].slots[slot], shard, found):
            return None
        return found if found.hexdigest() == expected else None

    def accept(self, shard: int, slot: int, found: hashlib._Hash | None) -> None:
        """Step over a tensor that is `verified`."""
        if found is None:
            raise ValueError("the tensor is not verified")
        self._hashes[shard] = found
        self._done.add((shard, slot))

    def adopt(self, shard: int, slot: int) -> None:
        """Take a tensor that a worker wrote into the hash and the journal."""
        self._read_back(self.shards[shard].slots[slot], shard, self._hashes[shard])
        self._log(shard, slot)

    def write(self, shard: int, slot: int, chunks: Iterator[tuple[int, Tensor]], pool: ThreadPoolExecutor) -> None:
        """Write the next tensor from its chunks, in the thread of `pool`."""
        waiting: deque[Future[None]] = deque()
        place, found, handle = self.shards[shard].slots[slot], self._hashes[shard], self._handles[shard]

        def put(values: Tensor, position: int) -> None:
            view = as_bytes(values)
            write_at(handle, view, position)
            found.update(view)

        for offset, values in chunks:
            waiting.append(pool.submit(put, values, place.begin + offset * values.element_size()))
            if len(waiting) > _QUEUE:
                waiting.popleft().result()
        for future in waiting:
            future.result()
        flush_behind(handle, place.begin, place.end)
        self._log(shard, slot)

    def close(self) -> dict[str, str]:
        """Make the files durable and return the SHA-256 of each."""
        for handle in self._handles:
            os.fsync(handle)
        return {shard.file: one.hexdigest() for shard, one in zip(self.shards, self._hashes, strict=True)}

    def _log(self, shard: int, slot: int) -> None:
        self._journal.append(self.shards[shard].slots[slot].entry.name, self._hashes[shard].hexdigest())
        self._done.add((shard, slot))

    def _read_back(self, place: Slot, shard: int, into: hashlib._Hash) -> bool:
        """Take a tensor's bytes into a hash, from the page cache and without copying them."""
        handle, position = self._handles[shard], place.begin
        if os.fstat(handle).st_size < place.end:
            return False
        while position < place.end:
            start = position - position % mmap.ALLOCATIONGRANULARITY
            stop = min(place.end, start + _READ_BLOCK)
            with mmap.mmap(handle, stop - start, access=mmap.ACCESS_READ, offset=start) as window:
                view = memoryview(window)
                with view[position - start :] as part:
                    into.update(part)
                view.release()
            position = stop
        flush_behind(handle, place.begin, place.end)
        return True
