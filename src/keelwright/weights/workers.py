# SPDX-License-Identifier: Apache-2.0
"""Who evaluates the tensors of a write: this process, several processes of this machine, or Ray tasks.

Every output tensor has a fixed place in a file that exists already, so workers share nothing and need no order. A
worker reads, evaluates and writes its pieces and says nothing but that they are done; the writer alone keeps the
journal.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from keelwright.core.errors import KeelwrightError, ResourceError
from keelwright.core.protocols import TensorSource, WeightEdit
from keelwright.core.ray_session import ray_session
from keelwright.weights.facts import Facts, collector
from keelwright.weights.layout import Shard
from keelwright.weights.stream import CHUNK_ELEMENTS, as_bytes, can_split, sweep

ExecutorName = Literal["processes", "ray"]
EXECUTORS: tuple[ExecutorName, ...] = ("processes", "ray")

TASK_BYTES = 32 << 20
"""About how much output one task writes: enough to make its cost vanish, little enough to share out evenly."""

MOST_WORKERS = 16
"""Beyond this the memory bus, not the number of cores, sets the pace; more must be asked for."""


@dataclass(frozen=True, slots=True)
class Target:
    """One output of a write: what is done, and into which files."""

    edit: WeightEdit
    folder: Path
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """Everything a worker needs to evaluate any piece."""

    targets: tuple[Target, ...]
    """Several for a sweep; all have the same tensors in the same order."""
    sources: Mapping[str, TensorSource]
    chunk_elements: int = CHUNK_ELEMENTS
    rounding_seed: int | None = None
    """Seed of rounding by chance; None: to nearest."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of elements of one output tensor."""

    shard: int
    slot: int
    start: int
    stop: int


Task = tuple[Piece, ...]
"""What one worker does at a time: pieces that follow one another in the files."""


def default_workers(total_bytes: int) -> int:
    """Return how many processes to use for so many bytes of output: one per core this process may use, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, MOST_WORKERS, total_bytes // TASK_BYTES))


def tasks_of(work: Work, slots: Sequence[tuple[int, int]]) -> list[Task]:
    """Return the tasks that make some tensors, in the order of the files.

    Args:
        work: What is written.
        slots: Indices of shard and slot.
    """
    tasks: list[Task] = []
    current: list[Piece] = []
    room = TASK_BYTES
    shards = work.targets[0].shards
    for shard, slot in slots:
        place = shards[shard].slots[slot]
        elements = place.entry.elements
        unit = elements
        if elements and all(can_split(target.edit, place.entry) for target in work.targets):
            item = (place.end - place.begin) // elements
            chunks = max(1, TASK_BYTES // (item * work.chunk_elements))
            unit = min(elements, chunks * work.chunk_elements)
        for start in range(0, max(1, elements), max(1, unit)):
            stop = min(elements, start + unit)
            current.append(Piece(shard, slot, start, stop))
            room -= (stop - start) * (place.end - place.begin) // max(1, elements)
            if room <= 0:
                tasks.append(tuple(current))
                current, room = [], TASK_BYTES
    if current:
        tasks.append(tuple(current))
    return tasks


def run_task(work: Work, task: Task) -> Facts:
    """Evaluate the pieces of a task and write them to their places; return what the edits tell of the tensors."""
    facts: Facts = []
    handles: dict[tuple[int, int], int] = {}
    try:
        for piece in task:
            slot = work.targets[0].shards[piece.shard].slots[piece.slot]
            entry = slot.entry
            begins = [target.shards[piece.shard].slots[piece.slot].begin for target in work.targets]
            edits = [target.edit for target in work.targets]
            for parts in sweep(
                edits,
                work.sources,
                entry,
                chunk_elements=work.chunk_elements,
                span=(piece.start, piece.stop),
                rounding_seed=work.rounding_seed,
                reduced=collector(edits, entry.name, facts),
            ):
                for number, (part, begin) in enumerate(zip(parts, begins, strict=True)):
                    key = (number, piece.shard)
                    if key not in handles:
                        target = work.targets[number]
                        handles[key] = os.open(target.folder / target.shards[piece.shard].file, os.O_WRONLY)
                    write_at(handles[key], as_bytes(part.values), begin + part.offset * part.values.element_size())
    finally:
        for handle in handles.values():
            os.close(handle)
    return facts


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MB that chunks have freed, instead of giving it back between two of them.

    Every chunk would touch fresh pages otherwise, which took a third of the time of an edit with several temporaries.
    Does nothing where the library is another than glibc.
    """
    call = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if call is not None:
        trim_threshold, mmap_threshold = -1, -3
        call(trim_threshold, 64 << 20)
        call(mmap_threshold, 32 << 20)


def write_at(handle: int, view: memoryview, position: int) -> None:
    """Write all of `view` at a byte position."""
    written = 0
    while written < len(view):
        written += os.pwrite(handle, view[written:], position + written)


def run_tasks(
    work: Work, tasks: Sequence[Task], *, executor: ExecutorName, workers: int
) -> Iterator[tuple[int, Facts]]:
    """Run tasks on several workers; yield the index of each as it is done, in any order, with its facts.

    Raises:
        KeelwrightError: Whatever a worker met; the tasks that were not begun are left.
        ResourceError: A worker died.
        MissingError: Ray is asked for and not installed.
    """
    yield from (_on_ray if executor == "ray" else _on_processes)(work, tasks, workers)


_adopted: Work | None = None


def _adopt(work: Work, parent: int) -> None:
    """Begin a worker process: one thread, no share in Ctrl-C, and no life after the parent's."""
    global _adopted  # noqa: PLW0603 - a worker process serves one write
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    _adopted = work


def _run_adopted(task: Task) -> Facts:
    if _adopted is None:
        raise RuntimeError("this process was not begun as a worker")
    return run_task(_adopted, task)


def _on_processes(work: Work, tasks: Sequence[Task], workers: int) -> Iterator[tuple[int, Facts]]:
    # A forked worker starts with everything imported and the sources open; elsewhere they are pickled. This process is
    # one of the workers, in a thread of its own: a process less to hold in memory.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ExitStack() as stack:
        pools: list[tuple[Executor, Callable[[Task], Facts]]] = []
        if workers > 1:
            pool = ProcessPoolExecutor(workers - 1, context, initializer=_adopt, initargs=(work, os.getpid()))
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            pools += [(pool, _run_adopted)] * (workers - 1)
        here = ThreadPoolExecutor(1)
        stack.callback(here.shutdown, wait=True, cancel_futures=True)
        pools.append((here, partial(run_task, work)))
        try:
            yield from _shared_out(tasks, pools)
        except BrokenProcessPool as error:
            raise ResourceError(
                "A worker process died.",
                expected=f"{workers} processes that live until the output is written",
                found="one that was killed, perhaps for want of memory",
                fix="run the same command again: it resumes; --workers 1 takes the least memory",
            ) from error


def _shared_out(
    tasks: Sequence[Task], pools: Sequence[tuple[Executor, Callable[[Task], Facts]]]
) -> Iterator[tuple[int, Facts]]:
    """Yield the index of each task as it is done; each pool has one task at work and one waiting.

    Few at a time: what is done stays close to the first gap, so that a resume has little to do twice.
    """
    waiting: dict[Future[Facts], tuple[int, int]] = {}
    following = iter(enumerate(tasks))
    free = [*range(len(pools))] * 2
    while True:
        # Processes are begun by the first task they get, and before the thread is: a fork copies no thread.
        while free and (following_task := next(following, None)) is not None:
            number, task = following_task
            place = free.pop(0)
            pool, function = pools[place]
            waiting[pool.submit(function, task)] = (number, place)
        if not waiting:
            return
        done, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda one: waiting[one]):
            number, place = waiting.pop(future)
            facts = future.result()
            free.append(place)
            yield number, facts


def _on_ray(work: Work, tasks: Sequence[Task], workers: int) -> Iterator[tuple[int, Facts]]:
    with ray_session(workers) as ray:
        remote = ray.remote(num_cpus=1, max_retries=2)(_run_on_ray)
        shared = ray.put(work)
        waiting: dict[Any, int] = {}
        for number, task in enumerate(tasks):
            waiting[remote.remote(shared, task)] = number
            if len(waiting) >= 2 * workers:
                yield from _finished_on_ray(ray, waiting)
        while waiting:
            yield from _finished_on_ray(ray, waiting)


def _run_on_ray(work: Work, task: Task) -> KeelwrightError | OSError | Facts:
    import torch

    torch.set_num_threads(1)
    try:
        return run_task(work, task)
    except (KeelwrightError, OSError) as error:
        # Returned, not raised: Ray would wrap it in an error of its own, and try it again.
        return error


def _finished_on_ray(ray: Any, waiting: dict[Any, int]) -> Iterator[tuple[int, Facts]]:
    done, _ = ray.wait(list(waiting), num_returns=1)
    for reference in done:
        number = waiting.pop(reference)
        result = ray.get(reference)
        if isinstance(result, Exception):
            raise result
        yield number, result
