# SPDX-License-Identifier: Apache-2.0
"""Workers: the same bytes whoever writes them, and nothing lost when one dies."""

import itertools
import json
import multiprocessing
import os
import signal
import time

import pytest
import torch

from keelwright.core.errors import KeelwrightError, NumericalError, ResourceError, StorageError
from keelwright.models.checkpoint import Checkpoint
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.weights import workers, write
from keelwright.weights.journal import begin, sole_writer
from keelwright.weights.plan import plan_edit

HALF = Linear(LinearConfig(0.5))


def random_tensors(seed):
    draw = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{index}.weight": torch.randn(19, 17, generator=draw) for index in range(7)}
    tensors["half"] = torch.randn(1033, generator=draw).to(torch.bfloat16)
    tensors["ids"] = torch.arange(3)
    tensors["empty"] = torch.empty(0, 4)
    return tensors


@pytest.fixture
def folders(make_folder):
    return make_folder("aligned", random_tensors(0)), make_folder("tuned", random_tensors(1), files=2)


@pytest.fixture
def small_tasks(monkeypatch):
    monkeypatch.setattr(workers, "TASK_BYTES", 900)


def planned(folders, edit=HALF, max_shard_bytes=4000):
    sources = {role: Checkpoint(folder) for role, folder in zip(("aligned", "tuned"), folders, strict=True)}
    return plan_edit(edit, sources, max_shard_bytes=max_shard_bytes)


def go(folders, out, *, edit=HALF, **effort):
    return write.materialise(planned(folders, edit), out, companions_from=folders[1], effort=write.Effort(**effort))


def weights_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors*"))}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("chunk", [7, 64, 1 << 18])
def test_bytes_and_digests_do_not_depend_on_the_number_of_processes(folders, tmp_path, small_tasks, count, chunk):
    alone = go(folders, tmp_path / "alone", workers=1)
    together = go(folders, tmp_path / "together", workers=count, chunk_elements=chunk)
    assert weights_of(tmp_path / "together") == weights_of(tmp_path / "alone")
    assert {k: v for k, v in together.files.items() if "safetensors" in k} == {
        k: v for k, v in alone.files.items() if "safetensors" in k
    }


def test_a_sweep_writes_what_single_writes_would(folders, tmp_path, small_tasks):
    edits = [Linear(LinearConfig(value)) for value in (0.0, 0.3, 1.0)]
    plans = [planned(folders, edit) for edit in edits]
    outs = [tmp_path / f"sweep-{number}" for number in range(3)]
    provenances = [write.Provenance(method="linear") for _ in edits]
    write.materialise_sweep(plans, outs, companions_from=folders[1], provenances=provenances)
    for number, edit in enumerate(edits):
        go(folders, tmp_path / f"single-{number}", edit=edit, workers=1)
        assert weights_of(outs[number]) == weights_of(tmp_path / f"single-{number}")


def test_tasks_cover_every_element_once_and_follow_the_files(folders, tmp_path, small_tasks):
    plan = planned(folders)
    work = workers.Work((workers.Target(HALF, tmp_path, plan.shards),), plan.sources, chunk_elements=64)
    places = [(number, slot) for number, shard in enumerate(plan.shards) for slot in range(len(shard.slots))]
    pieces = [piece for task in workers.tasks_of(work, places) for piece in task]
    assert pieces == sorted(pieces, key=lambda one: (one.shard, one.slot, one.start))
    for place in places:
        spans = [(one.start, one.stop) for one in pieces if (one.shard, one.slot) == place]
        assert spans[0][0] == 0
        assert spans[-1][1] == plan.shards[place[0]].slots[place[1]].entry.elements
        assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))


def test_an_error_of_a_worker_arrives_whole_and_leaves_nothing(make_folder, folders, tmp_path, small_tasks):
    tensors = random_tensors(1)
    tensors["layers.3.weight"][2, 1] = float("nan")
    spoilt = (folders[0], make_folder("spoilt", tensors))
    with pytest.raises(NumericalError, match=r"'tuned'.*'layers.3.weight', element 35") as caught:
        go(spoilt, tmp_path / "out", workers=2)
    assert caught.value.fix
    assert not list(tmp_path.glob("out*"))


def test_errors_survive_the_way_between_processes():
    import pickle

    error = StorageError("problem", expected="this", found="that", fix="so")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is StorageError and str(again) == str(error)
    assert isinstance(again, KeelwrightError)


def test_a_worker_that_dies_is_an_error_and_the_same_call_resumes(folders, tmp_path, small_tasks, monkeypatch):
    go(folders, tmp_path / "whole", workers=1)
    parent, run = os.getpid(), workers.run_task

    def dying(work, task):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(work, task)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "run_task", dying)
        with pytest.raises(ResourceError, match="worker process died"):
            go(folders, tmp_path / "out", workers=2)
    assert (tmp_path / "out.partial").is_dir()
    go(folders, tmp_path / "out", workers=2)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


@pytest.mark.parametrize("after", [1, 3, 6])
def test_kill_of_the_whole_command_leaves_no_worker_and_resumes(folders, tmp_path, small_tasks, after):
    go(folders, tmp_path / "whole", workers=1)

    def child():
        count, append = [], write.Journal.append

        def counting(self, tensor, sha256):
            append(self, tensor, sha256)
            count.append(tensor)
            if len(count) == after:
                os.kill(os.getpid(), signal.SIGKILL)

        write.Journal.append = counting
        go(folders, tmp_path / "out", workers=2)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while True:
        # The lock is free once the last worker is gone.
        try:
            with sole_writer(tmp_path / "out.partial"):
                break
        except StorageError:
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)
    manifest = go(folders, tmp_path / "out", workers=2)
    assert manifest.resumed == after
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_two_writers_on_one_output_are_refused(folders, tmp_path):
    plan = planned(folders)
    partial = begin(tmp_path / "out", digest=plan.digest, summary={})
    with sole_writer(partial), pytest.raises(StorageError, match="Another process is writing"):
        go(folders, tmp_path / "out")
    go(folders, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "merge.lock.json").read_text())["tensors"] == 10
