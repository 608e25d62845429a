# SPDX-License-Identifier: Apache-2.0
"""Programs with their tests, run apart from this process: what a run may use, and how it ended.

Each program runs in a process, session, folder and home of its own, with limits on time, memory, file size and open
files, standard input closed and its output thrown away. It may not reach the network, start processes, send signals,
or write outside its folder; a `TestRun` says what enforced this on this machine. What it reads is not restricted, but
has no way out. Only the standard library is there to import.

Cost: about 8 ms per program, and 0.1 s once per worker.
Limits: Linux alone. A program may start threads; their memory counts, their number does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from keelwright.core.config import require_in_range
from keelwright.core.errors import ConfigError, MissingError, ResourceError
from keelwright.judges.sandbox.confine import LINUX

Outcome = Literal["passed", "failed", "syntax_error", "timeout", "limit", "escaped"]
"""passed: every statement ran to the end. failed: it raised, crashed or left early. timeout: wall or CPU time.
limit: memory, file size or open files. escaped: it tried what a solution has no business doing."""

_START: Final = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from keelwright.judges.sandbox.warden import main; main(sys.argv[2], sys.argv[1], sys.argv[3])"
)
_PACKAGE_DEPTH: Final = 3
"""Folders from this file up to where the package is imported from."""
_FLAGS: Final = ("-s", "-S", "-B", "-P")
BARRIERS: Final = ("namespaces", "landlock", "seccomp", "tripwire")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use."""

    timeout_s: float = 10.0
    """Wall time, seconds. A busy machine makes slow programs fail, so time-outs are counted apart."""
    cpu_s: int = 10
    """CPU time, whole seconds."""
    memory_bytes: int = 1 << 30
    """Address space."""
    file_bytes: int = 16 << 20
    """Size of one file; where a scratch file system can be mounted, all files together have 64 MiB."""
    open_files: int = 64
    """Files open at once."""

    def __post_init__(self) -> None:
        require_in_range("timeout_s", self.timeout_s, low=0.0, low_open=True)
        require_in_range("cpu_s", self.cpu_s, low=1)
        require_in_range("memory_bytes", self.memory_bytes, low=256 << 20)
        require_in_range("file_bytes", self.file_bytes, low=0)
        require_in_range("open_files", self.open_files, low=16)


@dataclass(frozen=True, slots=True)
class Program:
    """A program and what is to hold for it."""

    source: str
    tests: str = ""
    """Run after the program in its namespace, and compiled apart, so that an open quote in the one cannot swallow the
    other."""


@dataclass(frozen=True, slots=True)
class TestRun:
    """How a program ended, and what kept it in."""

    __test__ = False  # not a test class of pytest's

    outcome: Outcome
    detail: str
    """Why, in a few words of the program's or ours; empty where it passed."""
    seconds: float
    """Wall time of the program itself."""
    network: Literal["namespace", "blocked sockets"]
    """Why it could not reach the network: it had none, or could make no socket."""
    writes: Literal["landlock", "tripwire"]
    """What kept it from writing outside its folder: the kernel, or Python's audit events."""
    processes: Literal["seccomp", "tripwire"]
    """What kept it from starting others: the kernel, or Python's audit events."""


def run_tests(program: Program | str, *, limits: Limits | None = None) -> TestRun:
    """Run one program; see `run_many` for more than a few.

    Args:
        program: A program with its tests, or both in one text.
        limits: What it may use.

    Raises:
        MissingError: This system is not Linux.
        ResourceError: The process that runs programs could not be started.
    """
    return run_many([program], workers=1, limits=limits)[0]


def run_many(
    programs: Sequence[Program | str],
    *,
    workers: int | None = None,
    limits: Limits | None = None,
    on_result: Callable[[int, TestRun], None] | None = None,
) -> list[TestRun]:
    """Run programs and return how each ended, in their order.

    Args:
        programs: Programs with their tests.
        workers: Programs at a time; None takes one per core.
        limits: What each may use.
        on_result: Told of each as it ends, with its index; for progress, and to keep what is done.

    Raises:
        ConfigError: `workers` is below 1.
        MissingError: This system is not Linux.
        ResourceError: A process that runs programs could not be started, or was killed from outside.
    """
    limits = limits or Limits()
    if workers is not None and workers < 1:
        raise ConfigError("'workers' is too small.", expected="at least 1", found=str(workers), fix="leave it out")
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(programs)):
        waiting.put(index)
    done: dict[int, TestRun] = {}
    faults: list[BaseException] = []
    wardens: list[Warden] = []
    told = threading.Lock()

    def work() -> None:
        try:
            with Warden(limits) as warden:
                wardens.append(warden)
                while not faults:
                    index = waiting.get_nowait()
                    run = warden.run(programs[index])
                    with told:
                        done[index] = run
                        if on_result is not None:
                            on_result(index, run)
        except queue.Empty:
            return
        except BaseException as fault:  # noqa: BLE001 - handed to the caller's thread
            faults.append(fault)

    count = min(workers or os.cpu_count() or 1, len(programs))
    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as fault:
        faults.append(fault)
        for warden in wardens:
            warden.stop()
        raise
    if faults:
        raise faults[0]
    return [done[index] for index in range(len(programs))]


class Warden:
    """A warm process that runs programs one at a time; a context manager.

    Args:
        limits: What each program may use.
        without: Names out of `BARRIERS` that are not put up, to see what the others hold.

    Raises:
        MissingError: This system is not Linux.
        ResourceError: The process could not be started.
    """

    def __init__(self, limits: Limits, *, without: Sequence[str] = ()) -> None:
        if not LINUX:
            raise MissingError(
                "Programs cannot be run apart on this system.",
                expected="Linux",
                found=sys.platform,
                fix="judge code on Linux, or in a container",
            )
        self._limits = limits
        self._folder = Path(tempfile.mkdtemp(prefix="keelwright-tests-")).resolve()
        source = str(Path(__file__).resolve().parents[_PACKAGE_DEPTH])
        self._process = subprocess.Popen(
            [sys.executable, *_FLAGS, "-c", _START, source, str(self._folder), ",".join(without)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder,
            # Equal programs end equally: sets keep their order from run to run.
            env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "PYTHONUTF8": "1"},
            start_new_session=True,
        )
        self.holds: Mapping[str, bool] = self._read()["holds"]
        """Which barriers hold on this machine, by name."""

    def run(self, program: Program | str) -> TestRun:
        """Run one program and return how it ended.

        Raises:
            ResourceError: The warm process was killed from outside.
        """
        if isinstance(program, str):
            program = Program(program)
        parts = [part for part in (program.source, program.tests) if part]
        limits = {name: getattr(self._limits, name) for name in self._limits.__dataclass_fields__}
        answer = self._ask({"parts": parts, "limits": limits})
        return TestRun(
            outcome=answer["outcome"],
            detail=answer["detail"],
            seconds=answer["seconds"],
            network="namespace" if self.holds["namespaces"] else "blocked sockets",
            writes="landlock" if self.holds["landlock"] else "tripwire",
            processes="seccomp" if self.holds["seccomp"] else "tripwire",
        )

    def stop(self) -> None:
        """End the process and, with it, whatever it is running; a `run` that waits for it raises."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End the process and remove its folder."""
        self.stop()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Warden:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        stdin = self._process.stdin
        if stdin is None:
            raise self._gone()
        try:
            stdin.write(json.dumps(job).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise self._gone() from error
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else b""
        if not line:
            raise self._gone()
        found: dict[str, Any] = json.loads(line)
        return found

    def _gone(self) -> ResourceError:
        self.close()
        return ResourceError(
            "The process that runs programs is gone.",
            expected="a process that stays until it is told to end",
            found="its end of the pipe is closed",
            fix="free some memory, and start again: results that were kept are not run again",
        )
