# SPDX-License-Identifier: Apache-2.0
"""Outputs: whole or not at all."""

import errno
import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from keelwright.core.errors import DataError, NumericalError, StorageError
from keelwright.core.protocols import Silent, TensorEntry
from keelwright.models.checkpoint import Checkpoint
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.weights import write
from keelwright.weights.journal import JOURNAL_FILE, PLAN_FILE, Journal
from keelwright.weights.layout import build_shard
from keelwright.weights.lock import LOCK_FILE, verify
from keelwright.weights.plan import plan_edit

HALF = Linear(LinearConfig(0.5))


def random_tensors(seed):
    draw = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{index}.weight": torch.randn(9, 7, generator=draw) for index in range(5)}
    tensors["half"] = torch.randn(33, generator=draw).to(torch.bfloat16)
    tensors["ids"] = torch.arange(3)
    return tensors


@pytest.fixture
def folders(make_folder):
    return make_folder("aligned", random_tensors(0)), make_folder("tuned", random_tensors(1))


def opened(folders):
    return {role: Checkpoint(folder) for role, folder in zip(("aligned", "tuned"), folders, strict=True)}


def go(folders, out, *, edit=HALF, max_shard_bytes=600, progress=None, **effort):
    plan = plan_edit(edit, opened(folders), max_shard_bytes=max_shard_bytes)
    effort = write.Effort(**effort)
    return write.materialise(plan, out, companions_from=folders[1], progress=progress, effort=effort)


def weights_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors*"))}


def expected_tensors():
    aligned, tuned = random_tensors(0), random_tensors(1)
    mixed = {
        name: (0.5 * aligned[name].float() + 0.5 * one.float()).to(one.dtype)
        for name, one in tuned.items()
        if one.is_floating_point()
    }
    return {**mixed, "ids": tuned["ids"]}


def test_the_file_equals_what_the_safetensors_library_would_write(folders, tmp_path):
    plan = plan_edit(HALF, opened(folders))
    write.materialise(plan, tmp_path / "out", companions_from=folders[1])
    ours = (tmp_path / "out" / "model.safetensors").read_bytes()
    theirs = save(expected_tensors(), metadata={"format": "pt"})
    # The metadata differ by our digest, so headers are compared as JSON and data as bytes.
    sizes = [int.from_bytes(raw[:8], "little") for raw in (ours, theirs)]
    headers = [json.loads(raw[8 : 8 + size]) for raw, size in zip((ours, theirs), sizes, strict=True)]
    assert headers[0].pop("__metadata__") == {"format": "pt", "keelwright": plan.digest}
    headers[1].pop("__metadata__")
    assert list(headers[0].items()) == list(headers[1].items())
    assert ours[8 + sizes[0] :] == theirs[8 + sizes[1] :]
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_a_sharded_output_holds_the_same_tensors(folders, tmp_path):
    manifest = go(folders, tmp_path / "out")
    found = {}
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        found.update(load_file(path))
    wanted = expected_tensors()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert manifest.tensors == 7 and manifest.resumed == 0
    assert manifest.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))


def test_the_bytes_do_not_depend_on_the_chunks(folders, tmp_path):
    go(folders, tmp_path / "one")
    for elements in (1, 10, 63):
        go(folders, tmp_path / str(elements), chunk_elements=elements)
        assert weights_of(tmp_path / str(elements)) == weights_of(tmp_path / "one")


def test_the_data_do_not_depend_on_how_the_inputs_are_cut(folders, make_folder, tmp_path):
    go(folders, tmp_path / "one", max_shard_bytes=10**9)
    cut = make_folder("aligned-cut", random_tensors(0), files=3), make_folder("tuned-cut", random_tensors(1), files=2)
    go(cut, tmp_path / "two", max_shard_bytes=10**9)
    raw = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    start = 8 + int.from_bytes(raw[0][:8], "little")
    assert raw[0][start:] == raw[1][start:]


def test_nothing_of_the_building_site_is_left(folders, tmp_path):
    go(folders, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "README.md", LOCK_FILE, "model.safetensors.index.json"} <= names
    assert not names & {JOURNAL_FILE, PLAN_FILE}


def test_every_file_has_its_digest_in_the_lock(folders, tmp_path):
    manifest = go(folders, tmp_path / "out")
    lock = json.loads((tmp_path / "out" / LOCK_FILE).read_text())
    assert lock["files"] == dict(manifest.files)
    assert set(lock["files"]) == {path.name for path in (tmp_path / "out").iterdir()} - {LOCK_FILE}
    assert verify(tmp_path / "out")["files"] == len(lock["files"])
    assert lock["sources"]["tuned"] == {"model": str(folders[1]), "digest": Checkpoint(folders[1]).data_digest()}


def test_the_config_states_the_dtype_of_most_weights(folders, tmp_path):
    go(folders, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_an_empty_output_folder_is_used(folders, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    go(folders, Path())
    assert (tmp_path / "out" / LOCK_FILE).is_file()


def test_an_output_folder_with_files_is_left_alone(folders, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("x")
    with pytest.raises(StorageError, match="is not empty"):
        go(folders, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert not (tmp_path / "out.partial").exists()


def test_progress_ends_at_its_total(folders, tmp_path):
    class Counting(Silent):
        total, done = 0, 0

        def stage(self, title, total=None, unit=""):
            self.total = total

        def advance(self, count=1):
            self.done += count

    progress = Counting()
    go(folders, tmp_path / "out", progress=progress)
    assert progress.total == progress.done > 0


def fail_at(monkeypatch, number, error):
    calls = []
    real = os.pwrite

    def failing(*args):
        calls.append(args)
        if len(calls) == number:
            raise OSError(error, os.strerror(error))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", failing)


@pytest.mark.parametrize("number", [1, 6, 9])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_keeps_what_is_finished_and_the_same_call_resumes(folders, tmp_path, monkeypatch, number, code):
    go(folders, tmp_path / "whole")
    with monkeypatch.context() as patch:
        fail_at(patch, number, code)
        with pytest.raises(StorageError) as caught:
            go(folders, tmp_path / "out")
    assert str(tmp_path / "out.partial") in caught.value.fix and "resumes" in caught.value.fix
    assert caught.value.expected and os.strerror(code) in caught.value.found
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    go(folders, tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_short_writes_are_completed(folders, tmp_path, monkeypatch):
    go(folders, tmp_path / "whole")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, view, position: real(handle, view[:5], position))
    go(folders, tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_a_file_system_that_cannot_reserve_room_is_used_all_the_same(folders, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    go(folders, tmp_path / "out")
    verify(tmp_path / "out")


def test_a_read_only_place_is_an_error(folders, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError) as caught:
        go(folders, tmp_path / "out")
    assert "cannot be written" in caught.value.problem and "Read-only" in caught.value.found


def test_bad_numbers_leave_nothing_behind(make_folder, folders, tmp_path):
    tensors = random_tensors(1)
    tensors["layers.3.weight"][2, 1] = float("nan")
    spoilt = (folders[0], make_folder("spoilt", tensors))
    with pytest.raises(NumericalError, match=r"'tuned'.*'layers.3.weight', element 15"):
        go(spoilt, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_input_that_changes_after_the_plan_is_noticed(folders, tmp_path):
    plan = plan_edit(HALF, opened(folders))
    os.utime(folders[0] / "model.safetensors", ns=(1, 1))
    with pytest.raises(DataError, match="was changed while it was read"):
        write.materialise(plan, tmp_path / "out", companions_from=folders[1])
    assert not list(tmp_path.glob("out*"))


def test_an_input_that_is_cut_after_the_plan_is_noticed(folders, tmp_path):
    plan = plan_edit(HALF, opened(folders))
    os.truncate(folders[0] / "model.safetensors", 900)
    with pytest.raises(DataError, match="became shorter"):
        write.materialise(plan, tmp_path / "out", companions_from=folders[1])
    assert not list(tmp_path.glob("out*"))


def test_a_changed_plan_does_not_resume(folders, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, 6, errno.ENOSPC)
        with pytest.raises(StorageError):
            go(folders, tmp_path / "out")
    with pytest.raises(StorageError, match="unfinished output of another plan"):
        go(folders, tmp_path / "out", edit=Linear(LinearConfig(0.25)))


def killed(folders, out, after):
    """Run in a child that is killed, as by kill -9, once `after` tensors are in the journal."""

    def child():
        torch.set_num_threads(1)
        count, append = [], Journal.append

        def counting(self, tensor, sha256):
            append(self, tensor, sha256)
            count.append(tensor)
            if len(count) == after:
                os.kill(os.getpid(), signal.SIGKILL)

        Journal.append = counting
        go(folders, out)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("after", range(1, 8))
def test_kill_after_every_tensor_then_resume_gives_identical_bytes(folders, tmp_path, after):
    go(folders, tmp_path / "whole")
    assert killed(folders, tmp_path / "out", after) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    manifest = go(folders, tmp_path / "out")
    assert manifest.resumed == after
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_a_finished_tensor_whose_bytes_were_lost_is_written_again_with_those_after_it_in_its_file(folders, tmp_path):
    go(folders, tmp_path / "whole")
    assert killed(folders, tmp_path / "out", 5) == -signal.SIGKILL
    first = sorted((tmp_path / "out.partial").glob("*.safetensors"))[0]
    raw = bytearray(first.read_bytes())
    raw[8 + int.from_bytes(raw[:8], "little")] ^= 1
    first.write_bytes(raw)
    in_first = len(load_file(tmp_path / "whole" / first.name))
    assert 0 < in_first < 5
    assert go(folders, tmp_path / "out").resumed == 5 - in_first
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_a_real_limit_on_file_size_is_an_error_and_resumes(folders, tmp_path):
    go(folders, tmp_path / "whole", max_shard_bytes=10**9)
    said = tmp_path / "said"

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            go(folders, tmp_path / "out", max_shard_bytes=10**9)
        except StorageError as error:
            said.write_text(str(error))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert "File too large" in said.read_text() and "resumes" in said.read_text()
    go(folders, tmp_path / "out", max_shard_bytes=10**9)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


@pytest.mark.slow  # writes 192 MB
def test_resident_memory_stays_below_a_quarter_of_one_tensor(make_folder, tmp_path):
    cap = 48 << 20
    folders = make_folder("aligned", {}), make_folder("tuned", {})
    shard = build_shard("model.safetensors", [TensorEntry("w", "BF16", (2 * cap,))], {"format": "pt"})
    for folder in folders:
        with (folder / "model.safetensors").open("wb") as stream:
            stream.write(shard.header)
            stream.truncate(shard.size)

    def child():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        go(folders, tmp_path / "out")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        (tmp_path / "grown").write_text(str(grown * 1024))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 4 * cap
    assert int((tmp_path / "grown").read_text()) < cap
