# SPDX-License-Identifier: Apache-2.0
"""Several models in one command: processes that die alone, resume, and leave nobody behind."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keelwright.heal import fleet

LIMIT = ("--suite", "workshop", "--limit", "4")
BASE, ALIGNED, NONE = "lab:workshop/base", "lab:workshop/aligned", "lab:workshop/none"
COMMAND = (sys.executable, "-c", "from keelwright.cli.app import main; main()")


@pytest.mark.slow  # each model is audited in a process of its own, which imports torch
def test_one_model_that_fails_stops_no_other_and_the_command_resumes(keelwright, keelwright_json, tmp_path):
    shutil.copytree(Path(fleet.__file__).parents[1] / "organisms" / "workshop" / "base", tmp_path / "later")
    (tmp_path / "later").rename(tmp_path / "hidden")
    words = ("audit", BASE, "later", "--against", ALIGNED, *LIMIT, "--out", "fleet")
    first = keelwright_json(*words, cwd=tmp_path, code=3)
    assert list(first["models"]) == [BASE]
    (failure,) = first["failed"]
    assert (failure["model"], failure["exit_code"]) == ("later", 3)
    records = tmp_path / "fleet" / "01-lab-workshop-base" / "records.jsonl"
    made = records.stat().st_mtime_ns
    (tmp_path / "hidden").rename(tmp_path / "later")
    second = keelwright_json(*words, cwd=tmp_path)
    assert list(second["models"]) == [BASE, "later"]
    assert second["failed"] == []
    assert second["models"][BASE] == second["models"]["later"]
    assert records.stat().st_mtime_ns == made
    done = keelwright(*words, cwd=tmp_path)
    assert "is finished already" in done.stderr
    assert done.stdout.count("report  fleet/") == 2
    assert keelwright("runs", "show", "fleet", cwd=tmp_path).stdout == done.stdout
    assert "cannot be replayed" in keelwright("runs", "replay", "fleet", "--out", "x", cwd=tmp_path, code=2).stderr
    assert "has no page" in keelwright("runs", "report", "fleet", cwd=tmp_path, code=2).stderr


@pytest.mark.slow  # a local cluster is begun
def test_ray_gives_the_same_as_processes(keelwright_json, tmp_path):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    words = ("audit", BASE, ALIGNED, NONE, *LIMIT)
    by_process = keelwright_json(*words, "--out", "processes", cwd=tmp_path, code=3)
    # Ray's own processes talk over sockets of this machine, so the network is not cut here.
    line = [*COMMAND, *words, "--executor", "ray", "--out", "ray", "--json"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    by_ray = json.loads(done.stdout)
    assert by_ray["models"] == by_process["models"]
    assert [one["model"] for one in by_ray["failed"]] == [NONE]


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(one) for one in path.read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow  # workers must have begun their work
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are found the Linux way")
@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_is_left_when_the_command_ends(with_signal, tmp_path):
    line = [*COMMAND, "audit", BASE, ALIGNED, "--suite", "workshop", "--batch-size", "1"]
    # Ctrl-C is sent to the command alone: a shell that runs in the background does not pass it on.
    process = subprocess.Popen(
        [*line, "--out", "fleet"], cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 180
        while len(list(tmp_path.glob("fleet/0*/records.jsonl"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        workers = children(process)
        assert len(workers) >= 2
        process.send_signal(with_signal)
        assert process.wait(timeout=60) == (130 if with_signal == signal.SIGINT else -signal.SIGKILL)
        if with_signal == signal.SIGINT:
            assert "the same command with --out fleet resumes" in process.stderr.read()
        until = time.monotonic() + 30
        while any(alive(pid) for pid in workers):
            assert time.monotonic() < until, "a worker goes on by itself"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_the_same_model_twice_is_refused(typed):
    done = typed("audit", BASE, ALIGNED, BASE, "--out", "fleet", code=2)
    assert "A model is named twice" in done.stderr
    assert BASE in done.stderr
    assert not Path("fleet").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--suite", "nope"], "There is no suite 'nope'"),
        (["--judge", "nope"], "There is no judge 'nope'"),
        (["--executor", "threads"], "'executor' is not a known choice"),
        (["--validate-judge", "empty.csv"], "holds no rows"),
    ],
)
def test_what_is_wrong_for_all_models_is_said_once_and_first(more, says, typed):
    Path("empty.csv").write_text("prompt,answer,label\n")
    done = typed("audit", BASE, ALIGNED, *more, "--out", "fleet", code=2)
    assert done.stderr.count(says) == 1
    assert not Path("fleet").exists()
