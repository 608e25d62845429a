# SPDX-License-Identifier: Apache-2.0
"""An audit that was killed goes on where it stopped, and ends as if nothing had happened."""

import json
import signal
from pathlib import Path

import pytest

SUITE = """
name: sampled
says: Several answers by two judges.
parts:
  - sets: [requests.jsonl]
    judges: [refusal-lists, refusal-classifier]
    temperature: 1.0
    samples: 4
    max_new_tokens: 48
    metrics: [rr_full, "over_refusal[judge=refusal-classifier]"]
    settings:
      requests.jsonl: {mapping: {prompt: q, kind: kind, id: id}}
"""


@pytest.fixture
def place(tmp_path):
    rows = [
        {"id": str(number), "q": f"Question number {number}, please.", "kind": ("harmful", "contrast")[number % 2]}
        for number in range(40)
    ]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.yaml").write_text(SUITE)
    return tmp_path


def words(models, name):
    return (
        "audit", models[0], "--against", models[1], "--suite", "suite.yaml", "--batch-size", "8", "--offline",
        "--out", name,
    )  # fmt: skip


def newest(path):
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return {(row["model_id"], row["item_id"], row["sample"]): row for row in rows}


def lines(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.slow  # four audits, each in a process of its own
def test_a_killed_audit_ends_like_an_undisturbed_one(keelwright_json, interrupted, killed_at, byte_models, place):
    whole = keelwright_json(*words(byte_models, "whole"), cwd=place)
    kept = place / "cut" / "records.jsonl"
    # While answers are sampled, and again while the second judge reads them.
    status, _ = interrupted(*words(byte_models, "cut"), ready=lambda: lines(kept) >= 24, cwd=place)
    assert status == -signal.SIGKILL
    with kept.open("ab") as stream:
        stream.write(b'{"item_id": "requests/1", "cut off in the mid')
    killed_at(
        *words(byte_models, "cut"),
        place="keelwright.judges.refusal_classifier:RefusalClassifierJudge.judge_all",
        cwd=place,
    )
    assert not (place / "cut" / "summary.json").exists()
    resumed = keelwright_json(*words(byte_models, "cut"), cwd=place)
    free = {"seconds", "run"}
    assert {key: value for key, value in resumed.items() if key not in free} == {
        key: value for key, value in whole.items() if key not in free
    }
    records = newest(kept)
    assert records == newest(place / "whole" / "records.jsonl")
    assert len(records) == 2 * 40 * 4
    assert {len(row["judgements"]) for row in records.values()} == {2}
    assert len({row["output"] for row in records.values()}) > 40
    # Nothing was asked twice: each answer has one line from its engine and at most one more from the second judge.
    assert lines(kept) <= 2 * len(records)


def test_a_finished_audit_without_its_page_gets_it(typed_json, typed):
    line = ("audit", "lab:workshop/base", "--limit", "4", "--out", "run")
    summary = typed_json(*line)
    Path("run", "report.html").unlink()
    assert typed_json(*line) == summary
    assert Path("run", "report.html").is_file()
    done = typed("audit", "lab:workshop/base", "--limit", "6", "--out", "run", code=3)
    assert "holds another run" in done.stderr
