# SPDX-License-Identifier: Apache-2.0
"""Nothing is lost on Ctrl-C and kill -9: the same command resumes and ends as if nothing had happened."""

import json
import signal

import pytest

from keelwright.core.protocols import Silent
from keelwright.heal.demo import make_damage

FREE = ("seconds", "run", "out", "reproduce", "written")


def same(one, other):
    return {key: value for key, value in one.items() if key not in FREE} == {
        key: value for key, value in other.items() if key not in FREE
    }


def words(damage, name):
    return (
        "heal", "lab:workshop/aligned", damage / "tuned", "--out", f"{name}-fixed", "--run", f"{name}-run",
        "--utility", damage / "mood.jsonl", "--unalign-with", damage / "forbidden.jsonl", "--limit", "60",
        "--utility-floor", "0.8", "--slack", "0.2", "--batch-size", "16",
    )  # fmt: skip


def records(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.fixture(scope="module")
def whole(keelwright_json, damage, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("whole")
    return keelwright_json(*words(damage, "a"), cwd=cwd)


@pytest.mark.parametrize("after", [40, 500])
def test_killed_run_resumes_and_equals_the_uninterrupted_one(
    after, whole, keelwright_json, interrupted, damage, tmp_path
):
    kept = tmp_path / "a-run" / "records.jsonl"
    status, _ = interrupted(*words(damage, "a"), ready=lambda: records(kept) >= after, cwd=tmp_path)
    assert status == -signal.SIGKILL
    assert not (tmp_path / "a-fixed").exists()
    assert same(keelwright_json(*words(damage, "a"), cwd=tmp_path), whole)
    lines = [json.loads(line) for line in kept.read_text().split("\n")[:-1]]
    assert len({(one["model_id"], one["item_id"]) for one in lines}) == len(lines)


def test_ctrl_c_leaves_130_and_says_how_to_go_on(interrupted, damage, tmp_path):
    kept = tmp_path / "a-run" / "records.jsonl"
    status, stderr = interrupted(
        *words(damage, "a"), ready=lambda: records(kept) >= 40, with_signal=signal.SIGINT, cwd=tmp_path
    )
    assert status == 130
    assert "the same command with --run a-run resumes" in stderr
    assert not (tmp_path / "a-fixed").exists()


def test_killed_around_the_writing_of_the_model_it_ends_as_if_nothing_had_happened(
    whole, keelwright_json, killed_at, damage, tmp_path
):
    line = words(damage, "a")
    fixed, run = tmp_path / "a-fixed", tmp_path / "a-run"
    # The model's files are complete, their folder has not got its name.
    killed_at(*line, place="keelwright.weights.write:finish", cwd=tmp_path)
    assert not fixed.exists()
    assert (tmp_path / "a-fixed.partial").is_dir()
    # The folder has its name, the run does not know yet.
    killed_at(*line, place="keelwright.runs.folder:RunFolder.remember", cwd=tmp_path)
    assert (fixed / "model.safetensors").is_file()
    assert not (tmp_path / "a-fixed.partial").exists()
    # The summary is there, the report is not.
    killed_at(*line, place="keelwright.heal.loop:write_report", cwd=tmp_path)
    assert (run / "summary.json").is_file()
    assert not (run / "report.html").exists()
    summary = keelwright_json(*line, cwd=tmp_path)
    assert same(summary, whole)
    assert (run / "report.html").is_file()
    times = {key: value for key, value in whole["written"].items() if key not in ("seconds", "files")}
    assert times == {key: summary["written"][key] for key in times}
    weights = "model.safetensors"
    assert summary["written"]["files"][weights] == whole["written"]["files"][weights]


@pytest.mark.slow
def test_a_folder_that_is_not_this_runs_output_is_never_taken_for_it(whole, keelwright, killed_at, damage, tmp_path):
    line = words(damage, "a")
    killed_at(*line, place="keelwright.heal.output:_left_by_a_kill", cwd=tmp_path)
    keelwright(
        "repair", "linear", "--aligned", "lab:workshop/aligned", "--tuned", damage / "tuned", "--coefficient", "0.11",
        "--out", "a-fixed", cwd=tmp_path,
    )  # fmt: skip
    before = (tmp_path / "a-fixed" / "model.safetensors").read_bytes()
    done = keelwright(*line, cwd=tmp_path, code=3)
    assert "is not empty" in done.stderr
    assert (tmp_path / "a-fixed" / "model.safetensors").read_bytes() == before


def test_demo_killed_in_its_damage_stage_goes_on_with_the_training(interrupted, damage, tmp_path):
    training = tmp_path / "d" / "inputs" / "training"
    status, _ = interrupted(
        "demo", "--out", "d", ready=lambda: training.is_dir() and any(training.iterdir()), cwd=tmp_path
    )
    assert status == -signal.SIGKILL
    assert not (tmp_path / "d" / "run.json").exists()
    tuned = make_damage(tmp_path / "d" / "inputs", seed=0, device="cpu", progress=Silent())
    weights = "model.safetensors"
    assert (tuned / weights).read_bytes() == (damage / "tuned" / weights).read_bytes()


@pytest.mark.slow
def test_demo_killed_in_its_damage_stage_ends_like_an_undisturbed_one(keelwright_json, interrupted, tmp_path):
    training = tmp_path / "d" / "inputs" / "training"
    interrupted("demo", "--out", "d", ready=lambda: training.is_dir() and any(training.iterdir()), cwd=tmp_path)
    resumed = keelwright_json("demo", "--out", "d", cwd=tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    assert same(resumed, keelwright_json("demo", "--out", "d", cwd=other))
