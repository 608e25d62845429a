# SPDX-License-Identifier: Apache-2.0
"""`heal --methods all` from end to end: the race, its page, its resumption, and how missing needs are answered."""

import dataclasses
import json
import random
import signal

import pytest

from keelwright.worlds.workshop.lessons import refused_request

ALIGNED = "lab:workshop/aligned"
FREE = ("seconds", "run", "out", "reproduce", "written")


def same(one, other):
    return {key: value for key, value in one.items() if key not in FREE} == {
        key: value for key, value in other.items() if key not in FREE
    }


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "refusals.jsonl"
    rows = (dataclasses.asdict(refused_request(rng)) for _ in range(24))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def line(damage, refusals):
    return (
        "heal", ALIGNED, damage / "tuned", "--out", "fixed", "--run", "run", "--utility", damage / "mood.jsonl",
        "--unalign-with", damage / "forbidden.jsonl", "--base", "lab:workshop/base", "--safety-rows", refusals,
        "--methods", "all", "--limit", "60", "--utility-floor", "0.8", "--slack", "0.2", "--batch-size", "128",
        "--refinements", "2",
    )  # fmt: skip


@pytest.fixture(scope="module")
def raced(keelwright, line, tmp_path_factory):
    """Where the race was run, its summary, and the process."""
    cwd = tmp_path_factory.mktemp("raced")
    done = keelwright(*line, cwd=cwd)
    return cwd, json.loads((cwd / "run" / "summary.json").read_text()), done


def test_all_methods_are_raced_and_one_front_is_shown(raced):
    cwd, summary, _ = raced
    race = {row["method"]: row for row in summary["race"]}
    tried = {row["method"] for row in summary["race"] if row["best"] is not None}
    assert {"linear", "resta", "slerp", "ties", "safe_delta", "safe_lora", "lox"} <= tried
    assert {row["ended"] for row in race.values()} >= {"left_behind", "finalist", "left_out"}
    assert race["somf"]["text"] == "needs pairs of a safe and an unsafe answer (--preferences FILE)"
    assert race["task_arithmetic"]["text"] == "is the same as linear with one tuned model"
    assert race["model_stock"]["text"] == "needs at least 2 tuned models"
    assert summary["verdict"] == "repaired", summary["sentence"]
    assert set(summary["status"]) == tried
    for index, by in enumerate(summary["dominated_by"]):
        whole = summary["trials"][index]["part"] == "selection"
        assert (by is None) == (index in summary["pareto"] or not whole)
    page = (cwd / "run" / "report.html").read_text()
    assert "Every method, and how far it came" in page
    assert all(name in page for name in race)


def test_a_searched_setting_has_its_own_name(raced):
    cwd, summary, _ = raced
    settings = {trial["method"]: set(trial["coefficients"]) for trial in summary["trials"]}
    assert settings["nearswap"] == {"t"}
    assert settings["safe_lora"] == {"threshold"}
    assert settings["linear"] == {"coefficient"}
    asked = {json.loads(row)["model_id"] for row in (cwd / "run" / "records.jsonl").read_text().split("\n")[:-1]}
    assert "nearswap t=0.001" in asked
    assert "linear coefficient=0.4" in asked


def test_only_methods_of_the_last_round_were_asked_all_items(raced):
    cwd, summary, _ = raced
    counts = {}
    for row in (cwd / "run" / "records.jsonl").read_text().split("\n")[:-1]:
        name = json.loads(row)["model_id"]
        counts[name] = counts.get(name, 0) + 1
    behind = {row["method"]: row for row in summary["race"] if row["ended"] == "left_behind"}
    whole = max(trial["items"] for trial in summary["trials"])
    for trial in summary["trials"]:
        ((setting, value),) = trial["coefficients"].items()
        count = counts[f"{trial['method']} {setting}={value:g}"]
        if trial["method"] in behind:
            assert count == trial["items"] == behind[trial["method"]]["items"] < whole
        else:
            assert count >= trial["items"] == whole


@pytest.mark.parametrize("after", [pytest.param(300, marks=pytest.mark.slow), 2500])
def test_a_killed_race_resumes_and_equals_the_uninterrupted_one(
    after, raced, line, keelwright_json, interrupted, tmp_path
):
    _, summary, _ = raced
    kept = tmp_path / "run" / "records.jsonl"
    status, _ = interrupted(
        *line, ready=lambda: kept.is_file() and kept.read_bytes().count(b"\n") >= after, cwd=tmp_path
    )
    assert status == -signal.SIGKILL
    assert not (tmp_path / "fixed").exists()
    assert same(keelwright_json(*line, cwd=tmp_path), summary)
    rows = [json.loads(row) for row in kept.read_text().split("\n")[:-1]]
    assert len({(one["model_id"], one["item_id"]) for one in rows}) == len(rows)


def test_the_plan_and_the_result_say_who_takes_part_and_who_does_not(raced):
    _, _, done = raced
    assert "methods raced in rounds" in done.stderr
    assert "left out" in done.stderr
    assert "is the same as linear with one tuned model" in done.stderr
    assert "last round, selection half" in done.stdout
    assert "Pareto front" in done.stdout
    assert "left behind after the round on a quarter of the selection half" in done.stdout
    assert "needs pairs of a safe and an unsafe answer (--preferences FILE)" in done.stdout


@pytest.mark.parametrize(
    ("method", "flag"),
    [
        ("safe-lora", "--base MODEL"),
        ("somf", "--preferences FILE"),
    ],
)
def test_a_named_method_without_what_it_needs_is_told_the_flag(method, flag, keelwright, damage, tmp_path):
    done = keelwright(
        "heal", ALIGNED, damage / "tuned", "--out", "fixed", "--no-utility", "--methods", method, cwd=tmp_path, code=2
    )
    assert flag in done.stderr
    assert not (tmp_path / "runs").exists()


def test_what_no_method_reads_is_warned_about(keelwright_json, damage, refusals, tmp_path):
    summary = keelwright_json(
        "heal", ALIGNED, damage / "tuned", "--out", "fixed", "--no-utility", "--limit", "20",
        "--safety-rows", refusals, "--base", "lab:workshop/base", cwd=tmp_path,
    )  # fmt: skip
    assert "no method reads --safety-rows" in summary["warnings"]
    assert "no method reads --base" in summary["warnings"]
    assert {trial["method"] for trial in summary["trials"]} == {"linear"}
