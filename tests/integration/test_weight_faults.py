# SPDX-License-Identifier: Apache-2.0
"""What goes wrong while weights are written, each with a real process: the right exit code, what is kept, and that the
same command ends afterwards in the bytes of an undisturbed run."""

from __future__ import annotations

import contextlib
import json
import os
import resource
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

Files = dict[str, Any]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's mounts, limits and signals")
BAD, MACHINE, INTERRUPTED = 2, 3, 130
MAIN = "from keelwright.cli.app import main\nmain()\n"
# Seven tensors: small tasks make seven of them, which two workers share.
TASK_BYTES = 256
SHARD_GB = "0.0000015"
NAMES = [
    *(f"model.layers.{layer}.mlp.{kind}_proj.weight" for layer in range(2) for kind in ("up", "down")),
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
]
JOURNAL = "progress.jsonl"
LOCK = "merge.lock.json"


def tensors_of(seed: int) -> dict[str, Tensor]:
    """Return a tiny checkpoint; other seeds than 0 are tuned from that of seed 0."""
    parent, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    found = {}
    for name in NAMES:
        shape = (9,) if "norm" in name else (23, 9)
        values = torch.randn(shape, generator=parent)
        found[name] = (values + 0.05 * torch.randn(shape, generator=own) if seed else values).to(torch.bfloat16)
    return found


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


def words(out: str | Path = "out", *more: str) -> list[str]:
    """Return what a user types after `keelwright`."""
    line = ("repair", "linear", "--aligned", "aligned", "--tuned", "tuned", "--coefficient", "0.3", "--out", str(out))
    return [*line, "--max-shard-gb", SHARD_GB, "--offline", *more]


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


def says(stderr: str, *parts: str) -> None:
    """Check that an error has its three explanations, and these words."""
    for part in ("\n  expected: ", "\n  found:    ", "\n  fix:      ", *parts):
        assert part in stderr, stderr


def at_tensor(number: int, action: str = "os.kill(os.getpid(), signal.SIGKILL)") -> str:
    """Return a trap: when that many tensors of this process stand in the journal, do something."""
    return f"""
import os, signal
from keelwright.weights import workers
from keelwright.weights.journal import Journal
workers.TASK_BYTES = {TASK_BYTES}
append, seen = Journal.append, []
def counting(self, tensor, sha256):
    append(self, tensor, sha256)
    seen.append(tensor)
    if len(seen) == {number}:
        {action}
Journal.append = counting
"""


def before(place: str, action: str) -> str:
    """Return a trap: do something before `package.module:name` is called."""
    module, _, name = place.partition(":")
    return f"""
import importlib, os, signal
owner = importlib.import_module({module!r})
called = getattr(owner, {name!r})
def trapped(*words, **named):
    {action}
    return called(*words, **named)
setattr(owner, {name!r}, trapped)
"""


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


def is_stopped(process: subprocess.Popen[str]) -> bool:
    # The state follows the command's name, which stands in brackets.
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The output of an undisturbed run."""
    place = tmp_path_factory.mktemp("whole")
    make_models(place)
    run(words(), cwd=place)
    found = contents(place / "out")
    assert sum(name.endswith(".safetensors") for name in found) == 2
    return found


def make_models(place: Path) -> None:
    write_model(place / "aligned", tensors_of(0))
    write_model(place / "tuned", tensors_of(1))


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A working folder with the models `aligned` and `tuned`."""
    make_models(tmp_path)
    return tmp_path


@contextlib.contextmanager
def small_disk(place: Path, options: str) -> Iterator[Callable[[str], None]]:
    """Mount a file system in memory; gives a function that mounts it again with other options."""
    place.mkdir(exist_ok=True)
    line = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(line, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")

    def again(other: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{other}", str(place)], check=True)

    try:
        yield again
    finally:
        subprocess.run(["umount", str(place)], check=True)


WORKERS = pytest.mark.parametrize("workers", ["1", "2"])


@LINUX
@WORKERS
def test_killed_in_the_middle_and_resumed_the_bytes_are_those_of_an_undisturbed_run(
    workers: str, here: Path, whole: Files
) -> None:
    line = words("out", "--workers", workers)
    run(line, cwd=here, trap=at_tensor(3), code=-signal.SIGKILL)
    assert not (here / "out").exists() and journal_lines(here / "out.partial") == 3
    run(line, cwd=here)
    assert contents(here / "out") == whole
    assert not (here / "out.partial").exists()


@pytest.mark.slow
@LINUX
@WORKERS
def test_killed_after_every_single_tensor_it_goes_on_from_each(workers: str, here: Path, whole: Files) -> None:
    line = words("out", "--workers", workers)
    for number in range(1, len(NAMES) + 1):
        run(line, cwd=here, trap=at_tensor(1), code=-signal.SIGKILL)
        # One new tensor each time: what was finished before is not written again.
        assert journal_lines(here / "out.partial") == number
    run(line, cwd=here, trap=at_tensor(1))
    assert contents(here / "out") == whole


def begun_by(place: Path) -> list[int]:
    """Return the processes whose working folder is `place`."""
    found = []
    for one in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if one.name.isdigit() and (one / "cwd").readlink() == place:
                found.append(int(one.name))
    return found


@LINUX
@WORKERS
def test_ctrl_c_ends_with_130_and_the_same_command_resumes(workers: str, here: Path, whole: Files) -> None:
    line = words("out", "--workers", workers)
    run(line, cwd=here, trap=at_tensor(2, "os.kill(os.getpid(), signal.SIGINT)"), code=INTERRUPTED)
    assert not (here / "out").exists()
    assert journal_lines(here / "out.partial") >= 2
    assert begun_by(here) == []
    run(line, cwd=here)
    assert contents(here / "out") == whole


@LINUX
def test_what_was_damaged_while_it_lay_there_is_written_again(here: Path, whole: Files) -> None:
    run(words(), cwd=here, trap=at_tensor(6), code=-signal.SIGKILL)
    first = sorted((here / "out.partial").glob("*.safetensors"))[0]
    raw = bytearray(first.read_bytes())
    raw[-1] ^= 1
    first.write_bytes(raw)
    with (here / "out.partial" / JOURNAL).open("a") as journal:
        journal.write('\n{"tensor": "lm_head.wei')
    run(words(), cwd=here)
    assert contents(here / "out") == whole


@LINUX
def test_a_recipe_that_was_killed_goes_on_as_well(here: Path) -> None:
    (here / "recipe.yaml").write_text(
        "merge_method: ties\nbase_model: aligned\nmodels:\n  - {model: tuned, parameters: {weight: 1, density: 0.4}}\n"
    )
    line = ["repair", "recipe.yaml", "--max-shard-gb", SHARD_GB, "--offline", "--out"]
    run([*line, "out"], cwd=here, trap=at_tensor(4), code=-signal.SIGKILL)
    assert journal_lines(here / "out.partial") == 4
    run([*line, "out"], cwd=here)
    run([*line, "again"], cwd=here)
    assert contents(here / "out") == contents(here / "again")


def sweep(out: str, *more: str) -> list[str]:
    line = words(out, *more)
    line[line.index("0.3")] = "0.3,0.8"
    return line


@LINUX
def test_a_sweep_that_was_killed_goes_on(here: Path, whole: Files) -> None:
    run(sweep("out"), cwd=here, trap=at_tensor(6), code=-signal.SIGKILL)
    assert len(list((here / "out").glob("*.partial"))) == 2
    run(sweep("out"), cwd=here)
    assert contents(here / "out" / "coefficient-0.3") == whole
    assert not list(here.glob("**/*.partial"))


@LINUX
@pytest.mark.parametrize("file", ["plan.json", "config.json", "README.md", LOCK])
def test_killed_within_a_small_file_nothing_of_it_is_left_over(file: str, here: Path, whole: Files) -> None:
    # Between the writing of the new content and its renaming.
    kill = f"os.path.exists(f'out.partial/.{file}.{{os.getpid()}}.part') and os.kill(os.getpid(), signal.SIGKILL)"
    run(words(), cwd=here, trap=before("os:fsync", kill), code=-signal.SIGKILL)
    assert list((here / "out.partial").glob(f".{file}.*.part"))
    run(words(), cwd=here)
    assert contents(here / "out") == whole


@LINUX
def test_a_disk_that_fills_up_while_it_is_written(here: Path, whole: Files) -> None:
    fill = "open('disk/filler', 'wb').write(bytes(os.statvfs('disk').f_bavail * os.statvfs('disk').f_bsize))"
    with small_disk(here / "disk", "size=64m"):
        trap = before("keelwright.weights.write:_write_shards", fill)
        text = run(words("disk/out"), cwd=here, trap=trap, code=MACHINE)
        says(text, "StorageError", "is full", "No space left on device", "the same command resumes")
        assert (here / "disk/out.partial/plan.json").is_file() and not (here / "disk/out").exists()
        (here / "disk/filler").unlink()
        run(words("disk/out"), cwd=here)
        assert contents(here / "disk/out") == whole
        assert not (here / "disk/out.partial").exists()


@LINUX
def test_a_disk_that_is_full_when_only_the_small_files_are_missing(here: Path, whole: Files) -> None:
    # Room for the folder, the plan, two shards and the journal, and for nothing else.
    with small_disk(here / "disk", "size=64m,nr_inodes=6") as remount:
        text = run(words("disk/out"), cwd=here, code=MACHINE)
        says(text, "StorageError", "is full", "finished tensors are kept in 'disk/out.partial'")
        assert journal_lines(here / "disk/out.partial") == len(NAMES)
        remount("nr_inodes=100")
        run(words("disk/out"), cwd=here)
        assert contents(here / "disk/out") == whole


@LINUX
def test_a_disk_that_is_too_small_from_the_start_is_not_touched(here: Path) -> None:
    with small_disk(here / "disk", "size=8m"):
        text = run(words("disk/out"), cwd=here, code=MACHINE)
        says(text, "StorageError", "The disk that holds 'disk/out' has too little room")
        assert list((here / "disk").iterdir()) == []


@LINUX
@WORKERS
def test_a_limit_on_the_size_of_files(workers: str, here: Path, whole: Files) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

    line = words("out", "--workers", workers)
    text = run(line, cwd=here, code=MACHINE, preexec_fn=limited)
    says(text, "StorageError", "could not be written", "File too large")
    assert not (here / "out").exists()
    run(line, cwd=here)
    assert contents(here / "out") == whole


@LINUX
def test_a_read_only_disk_before_and_in_the_middle(here: Path, whole: Files) -> None:
    with small_disk(here / "disk", "size=64m,ro") as remount:
        text = run(words("disk/out"), cwd=here, code=MACHINE)
        says(text, "StorageError", "'disk/out.partial' cannot be written", "Read-only file system")
        assert list((here / "disk").iterdir()) == []
        remount("rw")
        run(words("disk/out"), cwd=here, trap=at_tensor(4), code=-signal.SIGKILL)
        remount("ro")
        text = run(words("disk/out"), cwd=here, code=MACHINE)
        says(text, "StorageError", "'disk/out.partial' cannot be written", "the same command resumes")
        assert journal_lines(here / "disk/out.partial") == 4
        remount("rw")
        run(words("disk/out"), cwd=here)
        assert contents(here / "disk/out") == whole


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_to_write(here: Path) -> None:
    (here / "locked").mkdir(mode=0o500)
    says(run(words("locked/out"), cwd=here, code=MACHINE), "StorageError", "'locked/out.partial' cannot be written")
    assert list((here / "locked").iterdir()) == []
    (here / "locked").chmod(0o700)
    run(words("locked/out"), cwd=here)


SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(path: Path, text: str, data: bytes) -> None:
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data)


def lie(key: str, value: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        header, data = header_of(folder / SHARD)
        header[NAMES[0]][key] = value
        with_header(folder / SHARD, json.dumps(header), data)

    return spoil


def truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 5)


def claim_length(length: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        raw = (folder / SHARD).read_bytes()
        (folder / SHARD).write_bytes(length.to_bytes(8, "little") + raw[8:])

    return spoil


def overlap(folder: Path) -> None:
    """Let the first two tensors, which are equally large, share their bytes."""
    header, data = header_of(folder / SHARD)
    first, second = [name for name in header if name != "__metadata__" and header[name]["shape"] == [23, 9]][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    with_header(folder / SHARD, json.dumps(header), data)


def name_twice(folder: Path) -> None:
    header, data = header_of(folder / SHARD)
    text = json.dumps(header)
    row = json.dumps({NAMES[0]: header[NAMES[0]]})[1:-1]
    with_header(folder / SHARD, text[:-1] + ", " + row + "}", data)


def store_twice(folder: Path) -> None:
    """Store a tensor of the first shard in the second as well; the index knows the first only."""
    header, data = header_of(folder / OTHER)
    extra, start = tensors_of(1)[NAMES[0]].view(torch.uint8).numpy().tobytes(), len(data)
    header[NAMES[0]] = {"dtype": "BF16", "shape": [23, 9], "data_offsets": [start, start + len(extra)]}
    with_header(folder / OTHER, json.dumps(header), data + extra)


def leave_the_folder(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    text = json.loads(index.read_text())
    text["weight_map"][NAMES[0]] = "../aligned/" + SHARD
    index.write_text(json.dumps(text))


def poison(value: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        shutil.rmtree(folder)
        tensors = tensors_of(1)
        tensors["model.norm.weight"][5] = value
        write_model(folder, tensors)

    return spoil


SPOILT: dict[str, tuple[Callable[[Path], None], str, tuple[str, ...]]] = {
    "a truncated shard": (truncate, "DataError", (f"tuned/{SHARD}", "cut short")),
    "a header longer than its file": (claim_length(1 << 20), "DataError", (f"tuned/{SHARD}", "ends inside its header")),
    "an absurd header": (claim_length(1 << 60), "DataError", (f"tuned/{SHARD}", "not believable")),
    "a header cut short": (claim_length(100), "DataError", (f"tuned/{SHARD}", "The header is not JSON")),
    "wrong offsets": (lie("data_offsets", [0, 10]), "DataError", (NAMES[0], "does not fit its range of bytes")),
    "overlapping tensors": (overlap, "DataError", (f"tuned/{SHARD}",)),
    "a wrong dtype": (lie("dtype", "F32"), "DataError", (NAMES[0], "does not fit its range of bytes")),
    "an unknown dtype": (lie("dtype", "Q4"), "DataError", (NAMES[0], "unknown dtype")),
    "a negative size": (lie("shape", [-23, -9]), "DataError", (NAMES[0], "impossible shape")),
    "a name twice in a header": (name_twice, "DataError", (f"names '{NAMES[0]}' twice",)),
    "a tensor in two shards": (store_twice, "DataError", (f"tuned/{OTHER}", "that the index does not place there")),
    "an index that leaves the folder": (leave_the_folder, "UnsafeInputError", (f"../aligned/{SHARD}",)),
    "NaN": (poison(float("nan")), "NumericalError", ("'tuned'", "'model.norm.weight', element 5")),
    "infinity": (poison(float("-inf")), "NumericalError", ("'tuned'", "'model.norm.weight', element 5")),
}


RARE = ("an absurd header", "a header cut short", "overlapping tensors", "an unknown dtype", "infinity")


@pytest.mark.parametrize("kind", [pytest.param(one, marks=[pytest.mark.slow] * (one in RARE)) for one in SPOILT])
def test_a_spoilt_input_is_named_leaves_nothing_and_once_mended_all_is_well(
    kind: str, here: Path, whole: Files
) -> None:
    spoil, error, parts = SPOILT[kind]
    spoil(here / "tuned")
    says(run(words("out", "--force"), cwd=here, code=BAD), error, *parts)
    assert {path.name for path in here.iterdir()} == {"aligned", "tuned"}
    shutil.rmtree(here / "tuned")
    write_model(here / "tuned", tensors_of(1))
    run(words("out", "--force"), cwd=here)
    assert contents(here / "out") == whole


@LINUX
def test_a_nan_that_a_worker_meets_ends_all_of_them(here: Path) -> None:
    poison(float("nan"))(here / "tuned")
    text = run(words("out", "--force", "--workers", "2"), cwd=here, code=BAD, trap=at_tensor(10**6))
    says(text, "NumericalError", "'model.norm.weight', element 5")
    assert {path.name for path in here.iterdir()} == {"aligned", "tuned"}
    assert begun_by(here) == []


REWRITE = f"p = 'tuned/{SHARD}'; raw = bytearray(open(p, 'rb').read()); raw[-1] ^= 1; open(p, 'wb').write(raw)"
REPLACE = f"import shutil; shutil.copy('tuned/{SHARD}', 'new'); os.replace('new', 'tuned/{SHARD}')"
SHORTEN = f"os.truncate('tuned/{SHARD}', 900)"


@pytest.mark.parametrize(
    ("change", "problem"),
    [(REWRITE, "was changed while it was read"), (REPLACE, "was changed while it was read"), (SHORTEN, "shorter")],
    ids=["rewritten", "replaced", "cut short"],
)
def test_an_input_that_changes_between_the_plan_and_the_run(
    change: str, problem: str, here: Path, whole: Files
) -> None:
    trap = before("keelwright.repair.materialise:materialise_sweep", change)
    says(run(words(), cwd=here, trap=trap, code=BAD), "DataError", f"tuned/{SHARD}", problem)
    # Nothing of a mixture of two states is kept.
    assert {path.name for path in here.iterdir()} == {"aligned", "tuned"}
    shutil.rmtree(here / "tuned")
    write_model(here / "tuned", tensors_of(1))
    run(words(), cwd=here)
    assert contents(here / "out") == whole


@LINUX
def test_an_input_that_changes_before_the_resume_is_another_plan(here: Path, whole: Files) -> None:
    run(words(), cwd=here, trap=at_tensor(3), code=-signal.SIGKILL)
    shutil.move(here / "tuned", here / "kept")
    write_model(here / "tuned", tensors_of(2))
    says(run(words(), cwd=here, code=MACHINE), "StorageError", "holds an unfinished output of another plan", "delete")
    assert journal_lines(here / "out.partial") == 3
    shutil.rmtree(here / "tuned")
    shutil.move(here / "kept", here / "tuned")
    run(words(), cwd=here)
    assert contents(here / "out") == whole


def kept_of(folder: Path, *, weights: bool) -> dict[str, bytes]:
    """Return the files of an unfinished output; where the worker of a stopped process is still at work, the others."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if weights or path.suffix != ".safetensors"}


STOP = "os.kill(os.getpid(), signal.SIGSTOP)"


@contextlib.contextmanager
def held(line: list[str], *, cwd: Path, trap: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command that stops itself in a trap, and wait until it has."""
    process = begin(line, cwd=cwd, trap=trap)
    try:
        wait_for(lambda: process.poll() is not None or is_stopped(process), "the stop")
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


def let_go(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Let a stopped command go on to its end; return its exit status and stderr."""
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


@LINUX
@WORKERS
def test_a_second_writer_is_refused_and_the_first_one_ends_well(workers: str, here: Path, whole: Files) -> None:
    line = words("out", "--workers", workers)
    with held(line, cwd=here, trap=at_tensor(3, STOP)) as first:
        before_it = kept_of(here / "out.partial", weights=workers == "1")
        says(run(line, cwd=here, code=MACHINE), "StorageError", "Another process is writing 'out.partial'")
        assert kept_of(here / "out.partial", weights=workers == "1") == before_it
        other = words("out", "--out-dtype", "F32")
        says(run(other, cwd=here, code=MACHINE), "StorageError", "holds an unfinished output of another plan")
        assert kept_of(here / "out.partial", weights=workers == "1") == before_it
        assert let_go(first)[0] == 0
    assert contents(here / "out") == whole
    says(run(line, cwd=here, code=MACHINE), "StorageError", "The output folder 'out' is not empty")


@LINUX
def test_a_second_writer_that_comes_as_the_first_one_ends_is_refused(here: Path, whole: Files) -> None:
    late = before("keelwright.weights.write:sole_writer", STOP)
    with held(words(), cwd=here, trap=at_tensor(3, STOP)) as first, held(words(), cwd=here, trap=late) as second:
        assert let_go(first)[0] == 0
        code, text = let_go(second)
        assert code == MACHINE, text
        says(text, "StorageError", "out.partial")
    assert contents(here / "out") == whole
    assert not (here / "out.partial").exists()


@LINUX
def test_two_writers_that_begin_at_once_are_told_apart(here: Path, whole: Files) -> None:
    # The first one has made its folder and has not said yet what for.
    young = before("keelwright.weights.journal:sole_writer", STOP)
    with held(words(), cwd=here, trap=young) as first, held(words(), cwd=here, trap=at_tensor(2, STOP)) as second:
        code, text = let_go(first)
        assert code == MACHINE, text
        says(text, "StorageError", "Another process is writing 'out.partial'")
        assert let_go(second)[0] == 0
    assert contents(here / "out") == whole
