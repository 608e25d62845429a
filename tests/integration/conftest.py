# SPDX-License-Identifier: Apache-2.0
"""What a user types, in a process of its own that cannot reach the network."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from keelwright.core.protocols import Silent

OFFLINE_DRIVER = """
import socket
def refuse(*_):
    raise RuntimeError("a test reached for the network")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from keelwright.cli.app import main
main()
"""


def command(*words):
    return [sys.executable, "-c", OFFLINE_DRIVER, *map(str, words)]


@pytest.fixture(scope="session")
def keelwright():
    """Run `keelwright WORDS`; return the finished process. `code` is the exit status expected."""

    def run(*words, cwd=None, code=0, env=None):
        done = subprocess.run(
            command(*words), cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def keelwright_json(keelwright):
    """Run `keelwright WORDS --json` and return the one document on stdout."""

    def run(*words, **options):
        return json.loads(keelwright(*words, "--json", **options).stdout)

    return run


@pytest.fixture(scope="session")
def interrupted():
    """Start `keelwright WORDS`, wait until `ready()` is true, send `with_signal`, and return the exit status."""

    def run(*words, ready, with_signal=signal.SIGKILL, cwd=None):
        process = subprocess.Popen(command(*words), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 120
            while not ready():
                assert process.poll() is None, "ended before it could be interrupted:\n" + process.stderr.read()
                assert time.monotonic() < deadline, "never became ready"
                time.sleep(0.005)
            process.send_signal(with_signal)
            return process.wait(timeout=60), process.stderr.read()
        finally:
            process.kill()
            process.wait()

    return run


@pytest.fixture(scope="session")
def killed_at():
    """Run `keelwright WORDS` in a process that sends itself kill -9 when it calls `place` (`package.module:name`)."""

    def run(*words, place, cwd):
        module, _, name = place.partition(":")
        trap = f"""
import importlib, os, signal
owner = importlib.import_module({module!r})
*path, last = {name!r}.split(".")
for part in path:
    owner = getattr(owner, part)
setattr(owner, last, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
"""
        line = [sys.executable, "-c", trap + OFFLINE_DRIVER, *map(str, words)]
        done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"

    return run


@pytest.fixture(scope="session")
def damage(tmp_path_factory):
    """The demo's inputs: `tuned/`, `mood.jsonl`, `forbidden.jsonl`, `tuning.jsonl`."""
    from keelwright.heal.demo import make_damage

    folder = tmp_path_factory.mktemp("damage")
    make_damage(folder, seed=0, device="cpu", progress=Silent())
    return folder
