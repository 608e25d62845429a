# SPDX-License-Identifier: Apache-2.0
"""The innermost process: locks itself up, runs a program, and proves that it ran to its end.

The proof is a random word written to a pipe after the last statement. It lives in a chain of C calls alone: the
program runs in a thread whose stack holds the steps "run the program, write the word, leave", with a Python frame only
for the first, which does not know the word. So no frame, closure, module, constant or environment variable leads to
it, and what could look further (`gc`, frames of other threads, tracing, the process's memory) is a tripwire. A program
that leaves early, by `exit(0)` or `os._exit(0)`, has not written it.

Limits: nothing in the same process is out of reach of native code that knows this file, and a program whose objects
claim to equal anything satisfies any `==`. Signal handlers cannot be set: the program is not in the main thread.
"""

from __future__ import annotations

import _thread
import errno
import json
import operator
import os
import random
import signal
import sys
import traceback
import types
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import CodeType
from typing import Any, Final, NoReturn

from keelwright.judges.sandbox import confine
from keelwright.judges.sandbox.watch import tripwire

REPORT_FD: Final = 3
STACK_BYTES: Final = 64 << 20
DETAIL_CHARACTERS: Final = 300
PROGRAM: Final = "program"

_NO_MEMORY: Final = b'{"outcome": "limit", "detail": "memory"}'
_FULL: Final = frozenset({errno.EFBIG, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE})


def live(
    parts: Sequence[str],
    word: bytes,
    report_fd: int,
    folder: str,
    limits: Mapping[str, int],
    barriers: Mapping[str, bool],
) -> NoReturn:
    """Run the program and leave; meant for a process that was forked for it.

    Args:
        parts: Program and tests, run one after the other in one namespace, each compiled alone.
        word: Written to the pipe after the last part.
        report_fd: The pipe.
        folder: Working folder, home, and the only place for files.
        limits: `memory_bytes`, `file_bytes`, `open_files`, `cpu_s`.
        barriers: Which of `landlock`, `seccomp` and `tripwire` to put up.
    """
    _open_only(report_fd)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update({"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"})
    _limit(limits)
    confine.forbid_privileges()
    if barriers["landlock"]:
        confine.forbid_writes([folder, os.devnull])
    if barriers["seccomp"]:
        confine.forbid_calls()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    codes = _compiled(parts)
    random.seed(0)
    for name in [name for name in sys.modules if name.split(".")[0] in ("keelwright", "ctypes", "_ctypes")]:
        del sys.modules[name]
    module = types.ModuleType(PROGRAM)
    sys.modules[PROGRAM] = sys.modules["__main__"] = module
    if barriers["tripwire"]:
        sys.addaudithook(tripwire(folder, _escaped))
    _thread.stack_size(STACK_BYTES)
    _start(
        partial(_run, codes, module.__dict__),
        partial(os.write, REPORT_FD, word),
        partial(os._exit, 0),
    )
    while True:
        signal.pause()


def _start(*steps: Callable[[], object]) -> None:
    """Call the steps one after the other in a thread, until one raises; nothing but C holds them."""
    call: Callable[[Callable[[], object]], object] = operator.call
    _thread.start_new_thread(deque, (map(call, steps), 0))


def _run(
    codes: tuple[CodeType, ...],
    namespace: dict[str, Any],
    execute: Callable[[CodeType, dict[str, Any]], None] = exec,
    write: Callable[[int, bytes], int] = os.write,
    leave: Callable[[int], NoReturn] = os._exit,
) -> None:
    """Run the parts. What it calls is bound before the program can replace it, and after a fault it never returns."""
    try:
        for code in codes:
            execute(code, namespace)
    except MemoryError:
        # There may be no memory left to say it in other words.
        write(REPORT_FD, _NO_MEMORY)
        leave(1)
    except BaseException as error:  # noqa: BLE001 - whatever a program raises is its verdict
        try:
            _report(*_verdict(error, _line_of(error)))
        finally:
            leave(1)


def _compiled(parts: Sequence[str]) -> tuple[CodeType, ...]:
    try:
        return tuple(compile(part, f"<{PROGRAM}>", "exec", dont_inherit=True) for part in parts)
    except (SyntaxError, ValueError) as error:
        _report("syntax_error", f"{type(error).__name__}: {error}")
    except (MemoryError, RecursionError) as error:
        _report("limit", f"compiling: {type(error).__name__}")
    os._exit(1)


def _verdict(error: BaseException, line: int | None) -> tuple[str, str]:
    """Return outcome and detail of a program that raised."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return "limit", f"files: {errno.errorcode[error.errno]}"
    if isinstance(error, SystemExit):
        return "failed", "it left before the last test"
    where = "" if line is None else f" at line {line}"
    return "failed", f"{type(error).__name__}{where}: {error}"


def _line_of(error: BaseException) -> int | None:
    frames = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    return frames[0] if frames else None


def _report(
    outcome: str,
    detail: str,
    *,
    write: Callable[[int, bytes], int] = os.write,
    leave: Callable[[int], NoReturn] = os._exit,
) -> NoReturn:
    text = json.dumps({"outcome": outcome, "detail": detail[:DETAIL_CHARACTERS]})
    write(REPORT_FD, text.encode())
    leave(1)


def _escaped(detail: str) -> None:
    _report("escaped", detail)


def _open_only(report_fd: int) -> None:
    """Leave open nothing but the pipe, and nowhere to read from and to print to."""
    os.dup2(report_fd, REPORT_FD)
    os.closerange(REPORT_FD + 1, max(1 << 10, report_fd + 1))
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    os.close(null)


def _limit(limits: Mapping[str, int]) -> None:
    import resource

    wanted = {
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (bound, bound))
