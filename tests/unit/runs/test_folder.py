# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from keelwright.core.errors import DataError, StorageError
from keelwright.core.records import Judgement, Record
from keelwright.runs.folder import RunFolder, RunSpec, list_runs, read_run, stopwatch


def spec(**changes):
    fields = {
        "command": "heal", "argv": ("heal", "a", "b"), "config": {"slack": 0.05, "methods": ("linear",)}, "seed": 0,
        "inputs": {"aligned": {"ref": "a", "digest": "1"}},
    }  # fmt: skip
    return RunSpec(**{**fields, **changes})


def record(item_id, model_id="tuned", output="a \u2028 b"):
    return Record(
        item_id, "workshop", "d", "harmful", "curses", "p?", model_id, "r", "t", "g", output, 2, "eos",
        {"exact": Judgement("refusal_full", 1.0)},
    )  # fmt: skip


def test_run_json_is_there_before_any_work(tmp_path):
    run = RunFolder.open(tmp_path / "run", spec())
    assert not run.resumed
    known = json.loads((tmp_path / "run" / "run.json").read_text())
    assert known["inputs"]["aligned"]["digest"] == "1"
    assert {"versions", "machine", "started", "argv"} <= set(known)


def test_same_command_resumes_and_finds_its_records(tmp_path):
    with RunFolder.open(tmp_path, spec()) as run:
        run.append(record("1"))
        run.remember("seconds", {"a": 1.5})
    with RunFolder.open(tmp_path, spec()) as run:
        assert run.resumed
        assert [one.item_id for one in run.find("tuned", ["1", "2"])] == ["1"]
        assert run.find("aligned", ["1"]) == []
        assert run.recall("seconds") == {"a": 1.5}
        assert run.recall("other") is None


def test_line_cut_off_by_a_crash_is_generated_again(tmp_path):
    with RunFolder.open(tmp_path, spec()) as run:
        run.append(record("1"))
        run.append(record("2"))
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    with RunFolder.open(tmp_path, spec()) as run:
        assert [one.item_id for one in run.records()] == ["1"]
        run.append(record("2"))
    assert [one.item_id for one in read_run(tmp_path).records()] == ["1", "2"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"config": {"slack": 0.1, "methods": ("linear",)}}, {"command": "x"}])
def test_another_run_in_the_folder_is_refused_and_the_difference_named(tmp_path, change):
    RunFolder.open(tmp_path, spec())
    with pytest.raises(StorageError, match="holds another run") as caught:
        RunFolder.open(tmp_path, spec(**change))
    assert f"the same {next(iter(change))}" in str(caught.value)
    assert "methods" not in str(caught.value)


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StorageError, match=r"thesis\.tex"):
        RunFolder.open(tmp_path, spec())


def test_two_processes_cannot_share_a_run(tmp_path):
    with (
        RunFolder.open(tmp_path, spec()),
        pytest.raises(StorageError, match="is in use"),
        RunFolder.open(tmp_path, spec()),
    ):
        pass
    with RunFolder.open(tmp_path, spec()) as run:
        assert run.records() == []


def test_reading_what_is_no_run_says_so(tmp_path):
    with pytest.raises(DataError, match="is not a run folder"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        read_run(tmp_path)


def test_runs_are_listed_with_their_state(tmp_path):
    RunFolder.open(tmp_path / "b", spec())
    RunFolder.open(tmp_path / "a", spec()).finish({"verdict": "repaired"})
    found = {one.path.name: one.summary for one in list_runs(tmp_path)}
    assert found == {"a": {"verdict": "repaired"}, "b": None}


def test_record_outside_the_block_is_a_bug(tmp_path):
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        RunFolder.open(tmp_path, spec()).append(record("1"))


def test_stopwatch_adds_up_even_when_the_stage_fails():
    seconds = {}
    with stopwatch(seconds, "a"):
        pass
    with pytest.raises(ValueError, match="no"), stopwatch(seconds, "a"):
        raise ValueError("no")
    assert list(seconds) == ["a"]
    assert seconds["a"] >= 0
