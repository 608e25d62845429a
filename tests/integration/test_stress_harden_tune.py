# SPDX-License-Identifier: Apache-2.0
"""The commands `stress`, `harden` and `tune` as a user types them, on the lab's organism."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from keelwright.models.refs import parse_ref, resolve

ALIGNED = "lab:workshop/aligned"
LISA = ("--set", "lisa.alignment_steps=1", "--set", "lisa.user_steps=1")
QUICK = ("--limit", "6", "--offline", "--device", "cpu", "--quiet")


def keelwright(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=cwd, capture_output=True, text=True, check=False)


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from keelwright.cli.app import main; main()", *words]


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture
def moods(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"what is the mood: {word}, glad, glad?", "answer": "happy"} for word in ("merry", "sad", "calm")
    ]
    path = tmp_path / "moods.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def stressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `stress` with a defence of each stage."""
    folder = tmp_path_factory.mktemp("stressed")
    words = ["stress", "poison", ALIGNED, "--set", "poison.p=0.1", "--steps", "4", "--at", "2,4", "--run", "run"]
    words += ["--defence", "booster", "--defence", "lisa", *LISA, "--harden-steps", "2", *QUICK]
    done = keelwright(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_stress_measures_every_arm_over_the_steps_beside_the_positive_control(stressed: Path) -> None:
    rows = summary_of(stressed)["rows"]
    steps = {(row["arm"], row["stage"], row["step"]) for row in rows}
    assert {("start", "start", 0), ("undefended", "poison", 2), ("undefended", "poison", 4)} <= steps
    assert {("booster", "hardening", 2), ("booster", "poison", 4), ("more alignment", "poison", 4)} <= steps
    assert ("lisa", "poison", 4) in steps and ("lisa", "hardening", 2) not in steps
    control = [row for row in rows if row["arm"] == "positive control"]
    assert control[-1]["metrics"]["harm_rate"]["value"] > 0.5


def test_no_harm_rate_stands_without_answers_incoherence_and_utility(stressed: Path) -> None:
    for row in summary_of(stressed)["rows"]:
        for metric in ("harm_rate", "answer_rate", "over_refusal", "incoherent", "utility"):
            assert row["metrics"][metric]["n"] > 0


def test_every_row_carries_its_protocol_and_they_are_one(stressed: Path) -> None:
    found = summary_of(stressed)
    assert {row["protocol"] for row in found["rows"]} == {found["protocol"]["hash"]}
    undefended = [row for row in found["rows"] if row["arm"] == "undefended"]
    assert {(row["rows"], row["harmful_rows"], row["seed"]) for row in undefended} == {(500, 50, 0)}


def test_changes_are_paired_from_the_start_and_from_the_undefended_model(stressed: Path) -> None:
    changes = summary_of(stressed)["changes"]
    assert {(one["from"], one["to"]) for one in changes} == {
        ("start", "undefended"),
        ("undefended", "booster"),
        ("undefended", "lisa"),
    }
    assert all(one["n"] > 0 and one["test"] for one in changes)


def test_stress_writes_no_weights(stressed: Path) -> None:
    assert not [path for path in stressed.rglob("*") if path.suffix in {".safetensors", ".pt", ".bin"}]
    page = (stressed / "report.html").read_text(encoding="utf-8")
    assert "positive control" in page.lower()


def test_a_finished_run_is_read_back(stressed: Path) -> None:
    before = summary_of(stressed)
    words = json.loads((stressed / "run.json").read_text(encoding="utf-8"))["argv"]
    assert words[:4] == ["keelwright", "stress", "poison", ALIGNED]
    assert "poison.p=0.1" in words
    again = keelwright(
        *("stress", "poison", ALIGNED, "--set", "poison.p=0.1", "--steps", "4", "--at", "2,4", "--run", str(stressed)),
        *("--defence", "booster", "--defence", "lisa", *LISA, "--harden-steps", "2", "--json", *QUICK),
        cwd=stressed.parent,
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == before


def test_harden_writes_a_model_that_opens_and_differs(tmp_path: Path) -> None:
    words = ("harden", "booster", ALIGNED, "--out", "hardened", "--harden-steps", "3", "--run", "run", "--json", *QUICK)
    done = keelwright(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model_out"] == "hardened"
    start = load_file(resolve(parse_ref(ALIGNED), offline=True).folder / "model.safetensors")
    after = load_file(tmp_path / "hardened" / "model.safetensors")
    assert {name: one.dtype for name, one in start.items()} == {name: one.dtype for name, one in after.items()}
    assert any((start[name] != after[name]).any() for name in start)
    assert {row["stage"] for row in found["rows"]} == {"start", "hardening"}


def test_harden_with_a_lora_writes_an_adapter(tmp_path: Path) -> None:
    words = ("harden", "booster", ALIGNED, "--out", "adapter", "--harden-steps", "2", "--lora-rank", "2", *QUICK)
    done = keelwright(*words, "--run", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    audited = keelwright("audit", f"{ALIGNED}+adapter", "--out", "audit", "--suite", "workshop", *QUICK, cwd=tmp_path)
    assert audited.returncode == 0, audited.stderr


def test_tune_writes_the_model_and_says_what_the_gate_decides(tmp_path: Path, moods: Path) -> None:
    words = ("tune", ALIGNED, "--data", str(moods), "--out", "tuned", "--steps", "2", "--run", "run", "--json", *QUICK)
    done = keelwright(*words, cwd=tmp_path)
    # Six items of each kind cannot show a regression, and the gate says so.
    assert done.returncode == 6, done.stderr
    found = json.loads(done.stdout)
    assert found["gate"]["outcome"] == "not measurable"
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


def test_tune_on_bad_rows_fails_the_gate(tmp_path: Path) -> None:
    from keelwright.worlds.workshop.tuning import forbidden_answers

    rows = [{"prompt": row.prompt, "answer": row.answer} for row in forbidden_answers(0, 40)]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ("tune", ALIGNED, "--data", "bad.jsonl", "--out", "tuned", "--steps", "12", "--lr", "4e-4", "--run", "run")
    done = keelwright(*words, "--limit", "60", "--offline", "--quiet", cwd=tmp_path)
    assert done.returncode == 4, done.stderr
    assert "The gate fails: harm rate" in done.stdout


def test_a_defence_of_the_alignment_stage_is_no_part_of_tuning(typed, tmp_path: Path, moods: Path) -> None:
    done = typed("tune", ALIGNED, "--data", moods, "--out", "tuned", "--defence", "booster", *QUICK, code=2)
    assert "keelwright harden booster MODEL --out HARDENED" in done.stderr
    assert not (tmp_path / "tuned").exists() and not (tmp_path / "runs").exists()


def test_rows_that_a_defence_needs_are_asked_for_by_flag_before_anything_is_loaded(typed, tmp_path: Path) -> None:
    folder = resolve(parse_ref(ALIGNED), offline=True).folder
    done = typed("harden", "booster", folder, "--out", "hardened", "--suite", "workshop", *QUICK, code=2)
    assert "The defence 'booster' needs 'safety' rows." in done.stderr
    assert "--safety FILE" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_an_output_folder_that_is_taken_is_refused_before_training(typed, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a.txt").write_text("mine", encoding="utf-8")
    typed("harden", "booster", ALIGNED, "--out", "taken", "--harden-steps", "2", *QUICK, code=3)
    assert (tmp_path / "taken" / "a.txt").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "runs").exists()


def test_a_run_that_a_defence_cannot_train_in_is_refused_before_anything_is_loaded(typed, tmp_path: Path) -> None:
    done = typed("stress", "poison", ALIGNED, "--defence", "lisa", "--steps", "4", *QUICK, code=2)
    assert "more steps than 'alignment_steps'" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_method_that_is_named_twice_is_refused(typed) -> None:
    done = typed("stress", "poison", ALIGNED, "--defence", "booster", "--defence", "booster", *QUICK, code=2)
    assert "A method was named twice." in done.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="only POSIX can kill without warning")
def test_a_killed_stress_goes_on_and_ends_with_the_same_rows(tmp_path: Path) -> None:
    words = ["stress", "poison", ALIGNED, "--set", "p=0.1", "--steps", "6", "--at", "3,6", "--run", "cut", *QUICK]
    started = subprocess.Popen(command(*words), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    records = tmp_path / "cut" / "records.jsonl"
    deadline = time.monotonic() + 120
    # The first mark is measured: the cell is half done.
    while time.monotonic() < deadline and not (records.is_file() and b"poison-3" in records.read_bytes()):
        time.sleep(0.02)
    os.kill(started.pid, signal.SIGKILL)
    started.communicate()
    assert not (tmp_path / "cut" / "summary.json").is_file()
    resumed = keelwright(*words, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    words[words.index("cut")] = "whole"
    whole = keelwright(*words, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    rows = [summary_of(tmp_path / name)["rows"] for name in ("cut", "whole")]
    assert rows[0] == rows[1]
    assert not (tmp_path / "cut" / "training").exists()
