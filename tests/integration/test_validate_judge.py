# SPDX-License-Identifier: Apache-2.0
"""`audit --validate-judge`: judges against people's labels, with a model and without one."""

import csv
import json
import os
from pathlib import Path

import pytest

from keelwright.ops.agreement import Confusion

DATA = os.environ.get("KEELWRIGHT_DATA")
LIMITS = ("--limit", "20", "--quiet")


@pytest.fixture
def completions():
    folder = Path(DATA or "", "xstest")
    files = [folder / f"completions_{name}_labelled.csv" for name in ("mistralguard", "mistralinstruct")]
    if not DATA or not all(file.is_file() for file in files):
        pytest.skip("KEELWRIGHT_DATA has no xstest")
    return files


def labels_for(run, name, *, flipped=()):
    """Write what a person would say of the run's answers to harmful requests, but for the rows in `flipped`."""
    rows = [json.loads(line) for line in Path(run, "records.jsonl").read_text().split("\n")[:-1]]
    harmful = sorted((row for row in rows if row["kind"] == "harmful"), key=lambda row: row["item_id"])
    lines = []
    for number, row in enumerate(harmful):
        refused = next(iter(row["judgements"].values()))["label"].startswith("refusal") != (number in flipped)
        label = "full_refusal" if refused else "full_compliance"
        lines.append({"item_id": row["item_id"], "condition": row["model_id"], "label": label})
    Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_published_labels_are_read_as_they_are_without_a_model(completions, typed, typed_json):
    words = [word for file in completions for word in ("--validate-judge", file)]
    summary = typed_json("audit", *words, "--out", "run")
    (judge,) = summary["validation"]
    assert judge["judge"] == "refusal-lists@1"
    by_condition = {one["condition"]: one for one in judge["conditions"]}
    for file in completions:
        rows = list(csv.DictReader(file.open(encoding="utf-8")))
        refused = sum(row["final_label"] != "1_full_compliance" for row in rows)
        counts = by_condition[file.stem]["counts"]
        assert sum(counts.values()) == len(rows) == 450
        assert counts["tp"] + counts["fn"] == refused
        assert by_condition[file.stem]["kappa"]["value"] > 0.7
    assert len(judge["shifts"]) == 1
    run = json.loads(Path("run", "run.json").read_text())
    assert [run["inputs"][f"labels {number}"]["ref"] for number in (1, 2)] == [str(file) for file in completions]
    shown = typed("runs", "show", "run").stdout
    assert "sensitivity" in shown
    assert "between completions_mistralguard_labelled and completions_mistralinstruct_labelled" in shown
    assert typed_json("audit", *words, "--out", "run") == summary
    page = Path("run", "report.html").read_text(encoding="utf-8")
    assert "refusal-lists@1 against people’s labels" in page
    assert f"{by_condition[completions[0].stem]['kappa']['value']:.3f}" in page


def test_several_judges_are_held_against_the_same_labels(completions, typed_json):
    words = ("audit", "--validate-judge", completions[0], "--judge", "xstest-prefixes", "--judge", "qi-keywords")
    found = typed_json(*words, "--out", "run")["validation"]
    assert [one["judge"].partition("@")[0] for one in found] == ["xstest", "qi"]


def test_an_audit_is_corrected_by_what_people_said_of_its_own_answers(typed_json):
    model = ("audit", "lab:workshop/base", "--against", "lab:workshop/aligned", "--suite", "workshop", *LIMITS)
    typed_json(*model, "--out", "first")
    # Sorted by item, each has an answer of both models: of each model's 20 labels, 6 contradict the judge.
    labels_for("first", "labels.jsonl", flipped=range(12))
    summary = typed_json(*model, "--validate-judge", "labels.jsonl", "--judge", "refusal-lists", "--out", "second")
    assert [one["judge"] for one in summary["validation"]] == ["workshop-exact", "refusal-lists@1"]
    exact = summary["validation"][0]
    assert exact["metric"] == "refusal_rate"
    assert {one["condition"] for one in exact["conditions"]} == {"model", "against"}, exact["warnings"]
    for one in exact["conditions"]:
        refused = one["condition"] == "against"
        counts = Confusion(**one["counts"])
        # The judge is always right or always wrong here, so its errors say nothing of the other class.
        assert (counts.tp + counts.fp, counts.tn + counts.fn) == ((20, 0) if refused else (0, 20))
        assert one["corrected"] is None
        assert "too close to guessing" in one["not_corrected"]
    assert summary["metrics"]["refusal_rate"]["value"] == 0.0
    page = Path("second", "report.html").read_text()
    assert "Agreement with people, by condition" in page
    assert "too close to guessing" in page


def test_labels_of_one_condition_speak_of_the_audited_model(typed_json):
    words = ("audit", "lab:workshop/aligned", "--suite", "workshop", *LIMITS)
    typed_json(*words, "--out", "first")
    Path("labels.csv").write_text(
        "prompt,answer,label\n"
        + "".join(f"Question {n}?,I will not do that.,full_refusal\n" for n in range(30))
        + "".join(f"Question {n}?,First go to the market and buy a lamp.,full_compliance\n" for n in range(30, 60))
    )
    summary = typed_json(*words, "--validate-judge", "labels.csv", "--judge", "refusal-lists", "--out", "second")
    exact, lists = summary["validation"]
    assert exact["conditions"] == []
    assert "Not held against the labels" in exact["warnings"][0]
    assert lists["judge"] == "refusal-lists@1"
    (one,) = lists["conditions"]
    assert one["condition"] == "labels"
    assert one["sensitivity"]["value"] == one["specificity"]["value"] == 1.0
    refused = summary["metrics"]["refusal_rate"]["value"]
    assert one["corrected"]["value"] == pytest.approx(refused)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompt,answer,label\nWhat is tea?,A drink.,maybe\n", "'maybe' is not a label that is known"),
        ("prompt,answer,label\nWhat is tea?,A drink.\n", "line 2"),
        ("prompt,answer\nWhat is tea?,A drink.\n", "has no column 'label'"),
        ("item_id,label\na,full_refusal\n", "names answers without holding them"),
        ("", "holds no rows"),
    ],
)
def test_labels_that_cannot_be_used_are_named_and_leave_nothing(text, says, typed):
    Path("labels.csv").write_text(text)
    done = typed("audit", "--validate-judge", "labels.csv", "--out", "run", code=2)
    assert says in done.stderr
    assert not Path("run").exists()


def test_no_model_and_no_labels_is_told_what_is_missing(typed):
    assert "No model was named" in typed("audit", code=2).stderr
    Path("labels.csv").write_text("prompt,answer,label\nWhat is tea?,A drink.,full_compliance\n")
    done = typed("audit", "--validate-judge", "labels.csv", "--against", "lab:workshop/base", code=2)
    assert "--against lab:workshop/base and no MODEL" in done.stderr
