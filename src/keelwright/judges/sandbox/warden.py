# SPDX-License-Identifier: Apache-2.0
"""The warm process: reads programs from its standard input, runs each in a fork of a fork, and writes how it ended.

It holds Python's common modules, so that a program costs two forks instead of a start of Python. For each program the
warden forks a keeper, and the keeper forks the program's process: in a process namespace of its own where the machine
allows it, so that its end is the end of everything it started. Elsewhere the keeper adopts and ends what is left.

Jobs and answers are JSON, one per line; the first line it writes says what holds on this machine.
"""

from __future__ import annotations

import bisect  # noqa: F401 - loaded for the programs
import collections  # noqa: F401
import contextlib
import copy  # noqa: F401
import dataclasses  # noqa: F401
import datetime  # noqa: F401
import functools  # noqa: F401
import heapq  # noqa: F401
import itertools  # noqa: F401
import json
import math  # noqa: F401
import os
import re  # noqa: F401
import select
import shutil
import signal
import string  # noqa: F401
import sys
import time
import typing  # noqa: F401
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

from keelwright.judges.sandbox import confine
from keelwright.judges.sandbox.child import live

FAULTS: Final = ("failed", "syntax_error", "limit", "escaped")
REPORT_BYTES: Final = 1 << 16
SCRATCH_BYTES: Final = 64 << 20
_TICK_MS: Final = 20
_CPU_SLACK_S: Final = 0.5


def main(folder: str, source: str, without: str) -> None:
    """Serve until the input ends.

    Args:
        folder: Where working folders go.
        source: The import path of this package; programs do not get it.
        without: Barriers to leave out, with commas between them.
    """
    sys.path.remove(source)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    holds = _lock_up(without.split(","))
    _write(sys.stdout.fileno(), {"holds": holds})
    for line in sys.stdin:
        _write(sys.stdout.fileno(), _serve(json.loads(line), folder, holds))
    shutil.rmtree(folder, ignore_errors=True)


def _lock_up(without: Sequence[str]) -> dict[str, bool]:
    """Move to namespaces of its own, try in a fork which other barriers take hold, and return what there is."""
    attempts: Mapping[str, Callable[[], bool]] = {
        "namespaces": _new_namespaces,
        "landlock": lambda: _in_fork(lambda: confine.forbid_privileges() and confine.forbid_writes([os.devnull])),
        "seccomp": lambda: _in_fork(lambda: confine.forbid_privileges() and confine.forbid_calls()),
        "tripwire": lambda: True,
    }
    return {name: name not in without and attempt() for name, attempt in attempts.items()}


def _new_namespaces() -> bool:
    uid, gid = os.getuid(), os.getgid()
    spaces = confine.NEW_USER | confine.NEW_NETWORK | confine.NEW_MOUNTS | confine.NEW_IPC
    # Tried in a fork first: half-made namespaces would be worse than none.
    made = _in_fork(lambda: confine.unshare(spaces) and confine.keep_identity(uid, gid))
    return made and confine.unshare(spaces) and confine.keep_identity(uid, gid)


def _in_fork(attempt: Callable[[], bool]) -> bool:
    child = os.fork()
    if child == 0:
        os._exit(0 if attempt() else 1)
    return os.waitpid(child, 0)[1] == 0


def _serve(job: Mapping[str, Any], folder: str, holds: Mapping[str, bool]) -> dict[str, Any]:
    """Fork a keeper for one program and return its answer."""
    place = os.path.join(folder, "home")  # noqa: PTH118 - pathlib is not worth its start-up
    os.makedirs(place, mode=0o700, exist_ok=True)  # noqa: PTH103
    read_end, write_end = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        os.close(read_end)
        _keep(job, place, holds, write_end)
    os.close(write_end)
    answer = _read_all(read_end)
    os.close(read_end)
    os.waitpid(keeper, 0)
    _empty(place)
    try:
        found: dict[str, Any] = json.loads(answer)
    except ValueError:
        return {"outcome": "limit", "detail": "its keeper was killed; too little memory?", "seconds": 0.0}
    return found


def _keep(job: Mapping[str, Any], place: str, holds: Mapping[str, bool], answer_fd: int) -> NoReturn:
    """Run the program in a process of its own, wait for it no longer than allowed, and leave nothing behind."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    confine.die_with_parent()
    confine.adopt_orphans()
    limits, word = job["limits"], os.urandom(16).hex().encode()
    spaces = confine.NEW_PROCESSES | confine.NEW_MOUNTS
    if holds["namespaces"] and confine.unshare(spaces):
        confine.mount_scratch(place, SCRATCH_BYTES)
    read_end, write_end = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            confine.die_with_parent()
            live(job["parts"], word, write_end, os.path.realpath(place), limits, holds)
        finally:
            os._exit(1)
    os.close(write_end)
    said, in_time = _listen(read_end, child, started + limits["timeout_s"], word)
    seconds = time.monotonic() - started
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    _end_orphans()
    cpu_s = usage.ru_utime + usage.ru_stime
    verdict = _verdict(said, word, status, in_time=in_time, cpu_s=cpu_s, limits=limits)
    _write(answer_fd, {**verdict, "seconds": seconds})
    os._exit(0)


def _listen(fd: int, child: int, deadline: float, word: bytes) -> tuple[bytes, bool]:
    """Return what the program's process wrote, and whether it ended, or wrote the word, before the deadline."""
    said = b""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return said, False
        for _ in poll.poll(min(_TICK_MS, left * 1000) + 1):
            got = os.read(fd, REPORT_BYTES)
            said = (said + got)[-REPORT_BYTES:]
            if not got or said.endswith(word):
                return said, True
        # A process that it started may hold the pipe open; its own end is what counts. WNOWAIT leaves it to wait4.
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return said + _what_is_there(fd), True


def _what_is_there(fd: int) -> bytes:
    os.set_blocking(fd, False)
    try:
        return os.read(fd, REPORT_BYTES)
    except BlockingIOError:
        return b""


def _end_orphans() -> None:
    """Kill and reap every process that the program left to its keeper."""
    while True:
        for pid in _children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    mine = os.getpid()
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8") as stream:  # noqa: PTH123
                if int(stream.read().rpartition(")")[2].split()[1]) == mine:
                    found.append(int(name))
    return found


def _verdict(
    said: bytes, word: bytes, status: int, *, in_time: bool, cpu_s: float, limits: Mapping[str, Any]
) -> dict[str, str]:
    if said.endswith(word):
        return {"outcome": "passed", "detail": ""}
    report = _report(said)
    if report is not None:
        return report
    if not in_time:
        return {"outcome": "timeout", "detail": f"{limits['timeout_s']:g} s"}
    return _end(status, cpu_s, limits)


def _end(status: int, cpu_s: float, limits: Mapping[str, Any]) -> dict[str, str]:
    """Return the verdict on a process that said nothing of its end."""
    if os.WIFEXITED(status):
        return {"outcome": "failed", "detail": f"it left before the last test, with status {os.WEXITSTATUS(status)}"}
    if os.WTERMSIG(status) not in (signal.SIGKILL, signal.SIGXCPU):
        return {"outcome": "failed", "detail": f"ended by {signal.Signals(os.WTERMSIG(status)).name}"}
    if cpu_s >= limits["cpu_s"] - _CPU_SLACK_S:
        return {"outcome": "timeout", "detail": f"{limits['cpu_s']} s of CPU time"}
    return {"outcome": "limit", "detail": "killed; too little memory?"}


def _report(said: bytes) -> dict[str, str] | None:
    """Return what the program's process said of its end; a program may write there, but nothing that passes."""
    try:
        report = json.loads(said)
        outcome, detail = report["outcome"], str(report["detail"])
    except (ValueError, KeyError, TypeError):
        return None
    return {"outcome": outcome, "detail": detail} if outcome in FAULTS else None


def _empty(place: str) -> None:
    """Remove what a program wrote; with a scratch file system there is nothing."""
    for entry in os.scandir(place):
        if entry.is_dir(follow_symlinks=False):
            for parent, _, _ in os.walk(entry.path):
                os.chmod(parent, 0o700)  # noqa: PTH101
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)  # noqa: PTH108


def _read_all(fd: int) -> bytes:
    said = b""
    while got := os.read(fd, REPORT_BYTES):
        said += got
    return said


def _write(fd: int, value: Mapping[str, Any]) -> None:
    os.write(fd, json.dumps(value).encode() + b"\n")
