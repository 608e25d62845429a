# SPDX-License-Identifier: Apache-2.0
"""Weights large beside what the command may take of memory, or long enough to be killed from outside."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits, signals and /proc")
MAIN = "from keelwright.cli.app import main\nmain()\n"
ONLY = "model-00001-of-00001.safetensors"
JOURNAL = "progress.jsonl"
LOCK = "merge.lock.json"


def write_model(folder: Path, tensors: Mapping[str, Tensor], *, files: int = 2) -> Path:
    """Write a checkpoint folder of so many weight files."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"of": "a test"}')
    parts: list[dict[str, Tensor]] = [{} for _ in range(files)]
    for number, (name, tensor) in enumerate(tensors.items()):
        parts[number % files][name] = tensor
    index = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{files:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def words(out: str | Path = "out", *more: str, method: str = "linear", shard_gb: str = "5") -> list[str]:
    """Return what a user types after `keelwright`."""
    setting = ("--coefficient", "0.3") if method in ("linear", "slerp") else ()
    line = ("repair", method, "--aligned", "aligned", "--tuned", "tuned", *setting, "--out", str(out))
    return [*line, "--max-shard-gb", shard_gb, "--offline", *more]


def begin(line: list[str], *, cwd: Path, trap: str | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start the installed command, or one that a trap is laid in."""
    installed = Path(sys.executable).with_name("keelwright")
    plain = [str(installed)] if installed.is_file() else [sys.executable, "-c", MAIN]
    start = plain if trap is None else [sys.executable, "-c", trap + MAIN]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*start, *line], cwd=cwd, **pipes, **options)


def run(line: list[str], *, cwd: Path, code: int = 0, trap: str | None = None, **options: Any) -> str:
    """Run the command to its end and return what it said on stderr."""
    process = begin(line, cwd=cwd, trap=trap, **options)
    try:
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, f"exit {process.returncode}\n{stdout}\n{stderr}"
    if code:
        assert stdout == ""
    assert "Traceback" not in stderr
    return stderr


def contents(folder: Path) -> dict[str, Any]:
    """Return every file of an output; of its record, what does not depend on time and place."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    lock = json.loads(found.pop(LOCK))
    return {**found, LOCK: {key: value for key, value in lock.items() if key not in ("seconds", "created")}}


def journal_lines(folder: Path) -> int:
    path = folder / JOURNAL
    return sum(bool(line.strip()) for line in path.read_text().splitlines()) if path.is_file() else 0


def wait_for(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.005)


def begun_by(place: Path) -> list[int]:
    """Return the processes whose working folder is `place`."""
    found = []
    for one in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if one.name.isdigit() and (one / "cwd").readlink() == place:
                found.append(int(one.name))
    return found


@pytest.mark.slow
@LINUX
def test_a_long_write_killed_from_outside_leaves_no_worker_and_resumes(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    parent = {f"model.layers.{number}.weight": torch.randn(1024, 4096, generator=draw) for number in range(12)}
    write_model(tmp_path / "aligned", parent)
    write_model(tmp_path / "tuned", {name: values * 1.01 for name, values in parent.items()})
    line = words("out", "--workers", "2", shard_gb="0.1")
    process = begin(line, cwd=tmp_path)
    try:
        wait_for(lambda: journal_lines(tmp_path / "out.partial") >= 2 or process.poll() is not None, "two tensors")
        process.kill()
        assert process.wait(60) == -signal.SIGKILL, "it ended before it was killed"
    finally:
        process.kill()
        process.communicate()
    assert not (tmp_path / "out").exists()
    # A worker that outlived its parent would hold the output against this one.
    wait_for(lambda: begun_by(tmp_path) == [], "the end of the workers")
    run(line, cwd=tmp_path)
    run(words("again", "--workers", "1", shard_gb="0.1"), cwd=tmp_path)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


CAP = 96 << 20
# Importing costs what it costs: the cap is on what the work itself takes, thread stacks included.
CAPPED = f"""
import resource, sys
import keelwright.cli.repair, keelwright.repair.materialise, torch
torch.ones(1000).sum()
def taken():
    rows = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith("VmData"))
    return int(rows["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (taken() + {CAP},) * 2)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two models of one tensor that is four times larger than the cap."""
    place = tmp_path_factory.mktemp("large")
    values = torch.randn(12 << 10, 8 << 10, generator=torch.Generator().manual_seed(0))
    assert values.numel() * 4 == 4 * CAP
    write_model(place / "aligned", {"model.layers.0.weight": values}, files=1)
    values[::7] *= 1.25
    write_model(place / "tuned", {"model.layers.0.weight": values}, files=1)
    yield place
    shutil.rmtree(place)


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize(("method", "workers"), [("linear", "1"), ("linear", "2"), ("slerp", "2"), ("ties", "1")])
def test_a_tensor_four_times_larger_than_the_memory_cap(method: str, workers: str, large: Path) -> None:
    line = words("out", "--workers", workers, method=method, shard_gb="5")
    run(line, cwd=large, trap=CAPPED)
    raw = [
        torch.from_file(str(large / name / file), size=(large / name / file).stat().st_size, dtype=torch.uint8)
        for name, file in (("aligned", ONLY), ("tuned", ONLY), ("out", "model.safetensors"))
    ]
    aligned, tuned, out = (one[-4 * CAP :].clone().view(torch.float32) for one in raw)
    shutil.rmtree(large / "out")
    if method == "linear":
        assert torch.equal(out, torch.where(aligned == tuned, aligned, out))
        assert torch.allclose(out, 0.7 * aligned + 0.3 * tuned, rtol=1e-6, atol=1e-7)
    assert ((out != aligned).view(-1, 8 << 10)[::7].any(1)).all()


@LINUX
def test_the_memory_cap_is_one_that_a_whole_tensor_breaks(tmp_path: Path) -> None:
    script = CAPPED + f"torch.ones({CAP})\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "allocate memory" in done.stderr or "MemoryError" in done.stderr
