# SPDX-License-Identifier: Apache-2.0
"""Programs that nobody has read are run apart, and leave nothing behind."""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from keelwright.core.errors import ConfigError, ResourceError
from keelwright.judges.sandbox.runner import BARRIERS, Limits, Program, TestRun, Warden, run_many, run_tests

QUICK = Limits(timeout_s=0.5, cpu_s=2)
FORKS = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep({seconds})
        open({mark!r}, "w").close()
    os._exit(0)
time.sleep(0.2)
"""
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="programs are run apart on Linux alone")


@pytest.fixture(scope="module")
def warden() -> Iterator[Warden]:
    """A warm process with all that this machine has."""
    with Warden(QUICK) as one:
        yield one


def _run(warden: Warden, program: str) -> TestRun:
    return warden.run(textwrap.dedent(program))


@pytest.mark.parametrize(
    ("program", "outcome", "detail"),
    [
        ("assert 1 + 1 == 2", "passed", ""),
        ("assert 1 + 1 == 3, 'no'", "failed", "AssertionError at line 1: no"),
        ("def f(:\n    pass", "syntax_error", "SyntaxError"),
        ("x = '\x00'", "syntax_error", "null bytes"),
        ("while True: pass", "timeout", "0.5 s"),
        ("def f():\n  while True:\n    try:\n      return 1\n    finally:\n      continue\nf()", "timeout", "0.5 s"),
        ("x = 'a' * 10**10", "limit", "memory"),
        ("with open('x', 'w') as f:\n  for _ in range(100): f.write('a' * 10**6)", "limit", "EFBIG"),
        ("def f(n): return f(n + 1)\nf(0)", "failed", "RecursionError"),
        ("import os\nos.abort()", "failed", "SIGSEGV"),
        ("input()", "failed", "EOFError"),
    ],
)
def test_a_program_ends_as_it_should(warden: Warden, program: str, outcome: str, detail: str) -> None:
    run = warden.run(program)
    assert (run.outcome, detail in run.detail) == (outcome, True), run


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos._exit(0)\nassert False",
        "import sys\nsys.exit(0)\nassert False",
        "raise SystemExit\nassert False",
        "import os\nos.write(3, b'passed')\nos._exit(0)",
        'import os\nos.write(3, b\'{"outcome": "passed", "detail": ""}\')\nos._exit(0)',
        "import builtins, os\nbuiltins.exec = lambda *a: None\nos._exit = lambda code: None\nraise ValueError",
        "import os, threading, time\nthreading.Thread(target=os._exit, args=(0,)).start()\ntime.sleep(9)",
    ],
)
def test_leaving_before_the_last_test_is_no_pass(warden: Warden, program: str) -> None:
    assert _run(warden, program).outcome == "failed"


def test_the_program_cannot_replace_what_runs_the_tests() -> None:
    source = "import builtins, os\nbuiltins.exec = lambda *a: None\nos._exit = print\nos.write = print\n"
    assert run_tests(Program(source, "assert False"), limits=QUICK).outcome == "failed"


def test_an_open_quote_cannot_swallow_the_tests() -> None:
    assert run_tests(Program("x = '''", "assert False\n'''"), limits=QUICK).outcome == "syntax_error"


@pytest.mark.parametrize(
    "program",
    [
        # Every frame up the stack: none knows a word of 32 hexadecimal digits.
        """
        import sys, re, os
        frame, seen = sys._getframe(), []
        while frame is not None:
            seen.append(repr((frame.f_locals, frame.f_code.co_consts, list(frame.f_globals))))
            frame = frame.f_back
        word = re.search(r"[0-9a-f]{32}", " ".join([*seen, repr(dict(os.environ)), repr(sys.orig_argv)]))
        os.write(3, word[0].encode() if word else b"none")
        os._exit(0)
        """,
        # A traceback leads no further.
        """
        import os, re
        try:
            1 / 0
        except ZeroDivisionError as error:
            frame = error.__traceback__.tb_frame
        found = ""
        while frame is not None:
            found += repr(frame.f_locals)
            frame = frame.f_back
        word = re.search(r"[0-9a-f]{32}", found)
        os.write(3, word[0].encode() if word else b"none")
        os._exit(0)
        """,
    ],
)
def test_no_frame_holds_the_word_that_proves_the_end(warden: Warden, program: str) -> None:
    assert _run(warden, program).outcome == "failed"


@pytest.mark.parametrize(
    ("program", "deed"),
    [
        ("import os\nos.fork()", "another process"),
        ("import subprocess\nsubprocess.run(['true'])", "another process"),
        ("import os\nos.system('true')", "another process"),
        ("import os\ntry:\n  os.fork()\nexcept BaseException:\n  pass", "another process"),
        ("open('/tmp/keelwright-escaped', 'w')", "a write outside its folder"),
        ("import os\nos.open('../keelwright-escaped', os.O_CREAT | os.O_WRONLY)", "a write outside its folder"),
        ("import os\nos.symlink('/tmp', 'l')\nopen('l/keelwright-escaped', 'w')", "a write outside its folder"),
        ("import os\nos.remove('/tmp/keelwright-none')", "a change outside its folder"),
        ("import os\nos.rename('/tmp/keelwright-none', 'here')", "a change outside its folder"),
        ("import shutil\nshutil.rmtree('/usr/lib')", "a change outside its folder"),
        ("import sqlite3\nsqlite3.connect('/tmp/keelwright-escaped.db')", "a change outside its folder"),
        ("import socket\nsocket.create_connection(('192.0.2.1', 80))", "the network"),
        ("import urllib.request\nurllib.request.urlopen('http://192.0.2.1/')", "the network"),
        ("import ctypes", "native code"),
        ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", "a signal"),
        ("import gc\ngc.get_objects()", "a look at the runner"),
        ("import sys\nsys._current_frames()", "a look at the runner"),
        ("import sys\nsys.settrace(print)", "a look at the runner"),
        ("open('/proc/self/mem', 'rb')", "a look at the runner"),
    ],
)
def test_an_attempt_to_escape_is_named_and_fails(warden: Warden, program: str, deed: str) -> None:
    run = warden.run(program)
    assert (run.outcome, run.detail.startswith(deed)) == ("escaped", True), run


@pytest.mark.parametrize(
    "program",
    [
        "print('x' * 10**7)",
        "import sys\nsys.setrecursionlimit(10**5)\ndef f(n): return n and f(n - 1)\nassert f(5 * 10**4) == 0",
        "import threading\nt = threading.Thread(target=len, args=('',)); t.start(); t.join()",
        "import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3",
        "import tempfile\nwith tempfile.TemporaryDirectory() as d: open(d + '/x', 'w').write('1')",
        "import os\nassert os.getcwd() == os.environ['HOME'] and not os.listdir('.')",
        "open('x', 'w').write('1')\nimport os; os.mkdir('d'); os.rename('x', 'd/x'); os.remove('d/x'); os.rmdir('d')",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n  x: int\nassert A(1) == A(1)",
        "import sqlite3\nsqlite3.connect(':memory:').execute('select 1')",
        "assert __name__ != '__main__'",
    ],
)
def test_what_solutions_do_is_allowed(warden: Warden, program: str) -> None:
    assert warden.run(program).outcome == "passed"


def test_a_signal_handler_does_not_keep_a_program_alive(warden: Warden) -> None:
    run = _run(
        warden,
        """
        import signal
        try:
            for number in (signal.SIGTERM, signal.SIGXCPU, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)
        except ValueError:
            pass
        while True:
            pass
        """,
    )
    assert (run.outcome, run.seconds < 3.0) == ("timeout", True)


@pytest.mark.parametrize(
    "without",
    [(), ("tripwire",), ("tripwire", "seccomp"), ("tripwire", "seccomp", "namespaces")],
    ids=["all", "kernel", "namespaces", "keeper"],
)
def test_a_double_fork_leaves_no_process_behind(without: tuple[str, ...], tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    with Warden(QUICK, without=[*without, "landlock"]) as warden:
        warden.run(FORKS.format(seconds=0.6, mark=str(mark)))
        left = psutil.Process(warden._process.pid).children(recursive=True)
    time.sleep(0.7)
    assert (left, mark.exists()) == ([], False)


@pytest.mark.parametrize(
    ("program", "left"),
    [
        ("import os\nos.fork()", "seccomp"),
        ("import os\nos.execv('/bin/true', ['true'])", "seccomp"),
        ("import socket\nsocket.socket()", "seccomp"),
        ("open({outside!r}, 'w')", "landlock"),
        ("import os\nos.remove({inside!r})", "landlock"),
        ("import os\nos.mkdir({outside!r})", "landlock"),
    ],
)
def test_each_kernel_barrier_holds_alone(program: str, left: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.touch()
    with Warden(QUICK, without=[one for one in BARRIERS if one != left]) as warden:
        if not warden.holds[left]:
            pytest.skip(f"this kernel has no {left}")
        run = warden.run(program.format(outside=str(tmp_path / "new"), inside=str(kept)))
    assert (run.outcome, "Error" in run.detail) == ("failed", True)
    assert [one.name for one in tmp_path.iterdir()] == ["kept"]


def test_a_run_says_what_held(warden: Warden) -> None:
    run = warden.run("assert True")
    assert run.network == ("namespace" if warden.holds["namespaces"] else "blocked sockets")
    assert run.writes == ("landlock" if warden.holds["landlock"] else "tripwire")
    assert run.processes == ("seccomp" if warden.holds["seccomp"] else "tripwire")
    with Warden(QUICK, without=["namespaces", "landlock", "seccomp"]) as bare:
        run = bare.run("import socket\nsocket.socket()")
    assert (run.outcome, run.network, run.writes) == ("escaped", "blocked sockets", "tripwire")


def test_one_run_does_not_see_another(warden: Warden) -> None:
    assert warden.run("import math, os\nmath.pi = 3\nopen('x', 'w').close()").outcome == "passed"
    assert warden.run("import math, os\nassert math.pi > 3.1 and os.listdir('.') == []").outcome == "passed"


def test_equal_programs_end_equally() -> None:
    program = (
        "import random\nprint({'a', 'b', 'c'})\nraise ValueError(str({'a', 'b', 'c', 'd'}) + str(random.random()))"
    )
    assert len({run_tests(program, limits=QUICK).detail for _ in range(3)}) == 1


def test_many_runs_keep_their_order_and_are_told_of_as_they_end() -> None:
    told: dict[int, str] = {}
    programs = [f"assert {number} % 3" for number in range(12)]
    runs = run_many(programs, workers=2, limits=QUICK, on_result=lambda index, run: told.update({index: run.outcome}))
    assert [run.outcome for run in runs] == ["failed" if number % 3 == 0 else "passed" for number in range(12)]
    assert told == {index: run.outcome for index, run in enumerate(runs)}
    assert run_many([]) == []


def test_a_fault_while_told_reaches_the_caller() -> None:
    def refuse(index: int, run: TestRun) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_many(["assert True"] * 4, workers=2, limits=QUICK, on_result=refuse)


def test_a_killed_warden_is_an_error_that_says_what_to_do() -> None:
    with Warden(QUICK) as warden:
        warden.stop()
        with pytest.raises(ResourceError, match="free some memory"):
            warden.run("assert True")


def test_a_closed_warden_leaves_no_folder_and_no_process() -> None:
    with Warden(QUICK) as warden:
        warden.run("open('x', 'w').close()")
        folder, pid = warden._folder, warden._process.pid
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_stopping_a_warden_ends_the_program_that_it_runs() -> None:
    with Warden(Limits(timeout_s=30.0)) as warden:
        faults: list[ResourceError] = []

        def run() -> None:
            try:
                warden.run("while True: pass")
            except ResourceError as fault:
                faults.append(fault)

        thread = threading.Thread(target=run)
        thread.start()
        tree = psutil.Process(warden._process.pid)
        deadline = time.monotonic() + 20.0
        while len(tree.children(recursive=True)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        running = tree.children(recursive=True)
        warden.stop()
        thread.join()
        _, alive = psutil.wait_procs(running, timeout=10.0)
    assert (len(running), alive, len(faults)) == (2, [], 1)


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="'timeout_s' is out of range"):
        Limits(timeout_s=0)
    with pytest.raises(ConfigError, match="'workers' is too small"):
        run_many(["assert True"], workers=0)
