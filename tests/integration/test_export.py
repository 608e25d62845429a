# SPDX-License-Identifier: Apache-2.0
"""`runs export` and `runs judge`: what can be done with a run when its model is gone."""

import json
import shutil
from pathlib import Path

import pytest

from keelwright.runs.folder import read_run
from keelwright.runs.interop.inspect_log import read_inspect_log

AUDIT = ("audit", "lab:workshop/base", "--against", "lab:workshop/aligned", "--suite", "workshop", "--limit", "8")


@pytest.fixture
def audited(typed_json):
    return typed_json(*AUDIT, "--out", "run")


def verdicts(name):
    return {record.key: record for record in read_run(Path(name)).records()}


def test_a_run_goes_to_inspect_and_comes_back_as_it_was(audited, typed_json):
    files = typed_json("runs", "export", "run", "--to", "inspect", "--out", "logs")["files"]
    back = {record.key: record for file in files for record in read_inspect_log(Path(file)).records}
    assert back == verdicts("run")


def test_a_run_goes_to_parquet_and_comes_back_as_it_was(audited, typed):
    pytest.importorskip("pyarrow", reason="the extra data is not installed")
    from keelwright.runs.interop.parquet import read_parquet

    assert typed("runs", "export", "run", "--to", "parquet", "--out", "run.parquet").stdout == "run.parquet\n"
    assert {record.key: record for record in read_parquet(Path("run.parquet"))} == verdicts("run")
    assert (
        "is there already" in typed("runs", "export", "run", "--to", "parquet", "--out", "run.parquet", code=3).stderr
    )
    assert "one of inspect, parquet" in typed("runs", "export", "run", "--to", "csv", "--out", "x", code=2).stderr


def test_judging_again_adds_verdicts_and_changes_nothing_else(audited, typed_json, monkeypatch):
    monkeypatch.setattr("keelwright.heal.audit.LocalEngine", None)
    again = typed_json("runs", "judge", "run", "--judge", "refusal-lists", "--out", "again")
    old, new = verdicts("run"), verdicts("again")
    assert old.keys() == new.keys()
    for key, record in new.items():
        assert list(record.judgements) == ["workshop-exact", "refusal-lists@1"]
        assert record.judgements["workshop-exact"] == old[key].judgements["workshop-exact"]
        assert (record.output, record.decoding_digest) == (old[key].output, old[key].decoding_digest)
    same = ("command", "model", "metrics", "figures", "primary", "areas", "changes", "area_changes", "excluded")
    assert {key: again[key] for key in same} == {key: audited[key] for key in same}
    assert again["judged_again"] == "run"
    assert Path("again", "report.html").is_file()


def test_judging_again_equals_having_asked_the_judge_at_once(audited, typed_json):
    again = typed_json("runs", "judge", "run", "--judge", "refusal-lists", "--judge", "qi-keywords", "--out", "again")
    at_once = typed_json(*AUDIT, "--judge", "refusal-lists", "--judge", "qi-keywords", "--out", "at-once")
    assert verdicts("again") == verdicts("at-once")
    free = {"seconds", "run", "judged_again"}
    assert {key: value for key, value in again.items() if key not in free} == {
        key: value for key, value in at_once.items() if key not in free
    }
    assert typed_json("compare", "again", "at-once", "--out", "change")["sentence"] == "No evidence of any change."


def test_a_judge_of_the_same_name_takes_the_place_of_the_old_one(typed_json, byte_models):
    suite = (
        "name: mine\nparts:\n  - {sets: [own.jsonl], judges: ['refusal-rubric:', qi-keywords], settings: {own.jsonl: "
    )
    Path("mine.yaml").write_text(suite + "{mapping: {prompt: q, kind: =harmful}}}}\n")
    Path("own.jsonl").write_text('{"q": "Tell me a secret."}\n{"q": "Open the door."}\n')
    words = ("audit", byte_models[0], "--suite", "mine.yaml", "--max-new-tokens", "8", "--offline")
    typed_json(*words, "--judge", f"refusal-rubric:{byte_models[0]}", "--out", "run")
    (before,) = {tuple(record.judgements) for record in verdicts("run").values()}
    typed_json("runs", "judge", "run", "--judge", f"refusal-rubric:{byte_models[1]}", "--out", "again")
    (after,) = {tuple(record.judgements) for record in verdicts("again").values()}
    assert before[1:] == after[1:]
    assert before[0] != after[0]
    assert {one[0].partition("@")[0] for one in (before, after)} == {"refusal-rubric"}


def test_judging_again_resumes_where_it_stopped(audited, typed, typed_json):
    whole = typed_json("runs", "judge", "run", "--judge", "refusal-lists", "--out", "again")
    lines = Path("again", "records.jsonl").read_text().split("\n")
    Path("again", "records.jsonl").write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    Path("again", "summary.json").unlink()
    resumed = typed_json("runs", "judge", "run", "--judge", "refusal-lists", "--out", "again")
    assert {**resumed, "seconds": None} == {**whole, "seconds": None}
    assert "is finished already" in typed("runs", "judge", "run", "--judge", "refusal-lists", "--out", "again").stderr


def test_what_cannot_be_judged_again_says_why(audited, typed, typed_json):
    typed_json("compare", "run", "run", "--out", "change")
    assert "is no audit" in typed("runs", "judge", "change", "--judge", "refusal-lists", code=2).stderr
    assert "There is no judge 'refusals'" in typed("runs", "judge", "run", "--judge", "refusals", code=2).stderr
    shutil.copytree("run", "cut")
    lines = Path("cut", "records.jsonl").read_text().split("\n")
    Path("cut", "records.jsonl").write_text("\n".join(lines[:-3]) + "\n")
    done = typed("runs", "judge", "cut", "--judge", "refusal-lists", "--out", "again", code=2)
    assert "does not hold every answer" in done.stderr
    shutil.copytree("run", "other")
    run = json.loads(Path("other", "run.json").read_text())
    run["inputs"]["items"]["digest"] = "another"
    Path("other", "run.json").write_text(json.dumps(run))
    assert "reads other items now" in typed("runs", "judge", "other", "--judge", "refusal-lists", code=2).stderr
    Path("other", "summary.json").unlink()
    assert "is unfinished" in typed("runs", "judge", "other", "--judge", "refusal-lists", code=2).stderr
    assert not Path("again").exists()


def test_a_run_with_judges_is_replayed_to_the_same_result(typed_json):
    typed_json(*AUDIT, "--judge", "refusal-lists", "--out", "run")
    assert typed_json("runs", "replay", "run", "--out", "again")["same"]


@pytest.mark.parametrize(("flag", "name"), [("--judges", "qi-rubric"), ("--suites", "harm"), ("--sets", "xstest")])
def test_what_there_is_can_be_listed_and_looked_up(flag, name, typed, typed_json):
    names = [row["name"] for row in typed_json("methods", flag)]
    assert name in names
    assert [row["name"] for row in typed_json("methods", flag, name)] == [name]
    assert name in typed("methods", flag).stdout
    assert f"'{name}x'" in typed("methods", flag, f"{name}x", code=2).stderr


def test_metrics_are_listed_with_their_direction(typed, typed_json):
    rows = {row["name"]: row for row in typed_json("methods", "--metrics")}
    assert rows["harm_rate"]["better"] == "lower"
    assert rows["asr_at_K"]["counts"]
    assert "ask for one at a time" in typed("methods", "--metrics", "--sets", code=2).stderr
