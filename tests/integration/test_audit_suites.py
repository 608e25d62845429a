# SPDX-License-Identifier: Apache-2.0
"""Every suite from the command line to the page, with the network cut; what is wrong with an order is said first."""

import json
import os
from pathlib import Path

import pytest

LIMITS = ("--limit", "2", "--max-new-tokens", "8", "--batch-size", "8", "--offline", "--quiet")
DATA = os.environ.get("KEELWRIGHT_DATA")
FOLDERS = {
    "over-refusal": ["xstest"],
    "harm": ["harmbench", "advbench", "catqa", "ailuminate-demo"],
    "user-specific": ["u-safebench"],
    "code-robustness": ["humaneval", "mbpp"],
    "qi": ["catqa", "advbench"],
    "utility": ["gsm8k"],
    "toxicity": ["decodingtrust-toxicity"],
}


def require_sets(suite):
    missing = [name for name in FOLDERS.get(suite, []) if not DATA or not (Path(DATA) / name).is_dir()]
    if missing:
        pytest.skip(f"KEELWRIGHT_DATA has no {', '.join(missing)}")


def of_run(name):
    """The records of a run: of each answer the newest line."""
    rows = [json.loads(line) for line in Path(name, "records.jsonl").read_text().split("\n")[:-1]]
    return list({(row["model_id"], row["item_id"], row["sample"]): row for row in rows}.values())


@pytest.mark.parametrize("suite", ["core", "over-refusal", "harm", "user-specific", "utility"])
def test_a_suite_is_asked_judged_and_shown(suite, typed_json, byte_models):
    require_sets(suite)
    summary = typed_json("audit", byte_models[0], "--suite", suite, *LIMITS, "--out", "run")
    records = of_run("run")
    assert records
    assert all(record["judgements"] for record in records)
    assert summary["network"] == []
    parts = summary["suite"]["parts"]
    assert sum(part["items"] for part in parts) == len({record["item_id"] for record in records})
    wanted = [metric for part in parts for metric in part["metrics"]]
    assert [figure["metric"] for figure in summary["figures"]] == wanted
    assert Path("run", "report.html").stat().st_size > 10_000


def test_judges_of_a_suite_all_give_their_verdict_on_every_answer(typed_json, byte_models):
    require_sets("over-refusal")
    typed_json("audit", byte_models[0], "--suite", "over-refusal", *LIMITS, "--out", "run")
    names = [{judge.partition("@")[0] for judge in record["judgements"]} for record in of_run("run")]
    assert names
    assert all({"refusal-lists", "refusal-classifier"} < found and len(found) == 3 for found in names)


def test_a_remedy_at_the_prompt_is_asked_and_kept_in_the_records(typed_json, byte_models):
    require_sets("user-specific")
    words = ("audit", byte_models[0], "--suite", "user-specific", *LIMITS)
    typed_json(*words, "--out", "plain")
    summary = typed_json(*words, "--mitigation", "cot", "--out", "thought")
    plain, thought = ({one["item_id"]: one for one in of_run(name)} for name in ("plain", "thought"))
    assert plain.keys() == thought.keys()
    assert {one["facts"]["mitigation"] for one in thought.values()} == {"cot"}
    assert any(plain[item]["prompt"] != thought[item]["prompt"] for item in plain)
    assert summary["suite"]["parts"][0]["mitigation"] == "cot"


def test_a_local_model_is_the_judge_of_a_rubric(typed_json, byte_models):
    require_sets("qi")
    judge = f"qi-rubric:{byte_models[1]}"
    summary = typed_json("audit", "lab:workshop/base", "--suite", "qi", "--judge", judge, *LIMITS, "--out", "run")
    records = of_run("run")
    said = [next(iter(record["judgements"].items())) for record in records]
    assert all(name.startswith("qi-rubric@") for name, _ in said)
    # The judge writes noise, which is no verdict: it is counted, and no rate is made of it.
    unread = sum(verdict["label"] == "unparsed" for _, verdict in said)
    assert summary["excluded"] == {"unparsed": unread}
    assert unread > 0
    harm = summary["metrics"]["harm_rate"]
    assert (0 if harm is None else harm["n"]) == len(records) - unread
    assert next(one for one in summary["figures"] if one["metric"] == "asr_keyword")["estimate"]["n"] == len(records)


def test_a_suite_of_ones_own_draws_several_continuations(typed_json, byte_models):
    require_sets("toxicity")
    Path("mine.yaml").write_text(
        "name: mine\nsays: Worst of three continuations.\nparts:\n"
        "  - {sets: [decodingtrust-toxicity], builder: continuations, judges: [toxicity], max_new_tokens: 8,\n"
        "     temperature: 1.0, top_p: 0.9, samples: 3, headline: false,\n"
        "     metrics: [expected_maximum_toxicity_3, toxic_fraction]}\n"
    )
    summary = typed_json("audit", byte_models[0], "--suite", "mine.yaml", *LIMITS, "--out", "run")
    assert {(one["sample"], one["samples"]) for one in of_run("run")} == {(0, 3), (1, 3), (2, 3)}
    assert {figure["metric"]: figure["estimate"] is not None for figure in summary["figures"]} == {
        "expected_maximum_toxicity_3": True, "toxic_fraction": True,
    }  # fmt: skip
    assert set(summary["metrics"].values()) == {None}


@pytest.mark.slow  # every problem is asked in 25 forms, some of them long, and their programs are run
def test_programs_are_run_in_every_form(typed_json, byte_models):
    require_sets("code-robustness")
    summary = typed_json(
        "audit", byte_models[0], "--suite", "code-robustness", "--limit", "2", "--max-new-tokens", "4",
        "--batch-size", "4", "--offline", "--quiet", "--out", "run",
    )  # fmt: skip
    assert len(of_run("run")) >= 2 * 20
    solved = next(figure for figure in summary["figures"] if figure["metric"] == "pass_at_1")
    assert solved["estimate"]["value"] == 0.0


def test_the_same_audit_on_the_same_folder_returns_what_is_there(typed, typed_json):
    words = ("audit", "lab:workshop/base", "--limit", "4", "--out", "run")
    first = typed_json(*words)
    assert typed_json(*words) == first
    assert "is finished already" in typed(*words).stderr


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--suite", "over-refsal"], 2, "There is no suite 'over-refsal'"),
        (["--suite", "nowhere.yaml"], 3, "There is no suite file 'nowhere.yaml'"),
        (["--judge", "refusal-list"], 2, "There is no judge 'refusal-list'"),
        (["--judge", "qi-rubric"], 2, "The judge 'qi-rubric' asks a model, and none is named"),
        (["--judge", "qi-rubric:openai:some-model", "--offline"], 3, "sends requests and answers to"),
        (["--mitigation", "cots"], 2, "'mitigation' is not a known choice"),
        (["--suite", "empty.yaml"], 2, "is not a whole suite"),
        (["--suite", "unknown-metric.yaml"], 2, "There is no metric 'refusal_rat'"),
        (["--validate-judge", "nowhere.csv"], 3, "There is no file 'nowhere.csv'"),
        (["--validate-judge", "labels.csv"], 2, "labels.csv line 3"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(more, code, says, typed, monkeypatch):
    monkeypatch.setattr("keelwright.heal.audit.LocalEngine", None)
    Path("empty.yaml").write_text("name: empty\nparts: []\n")
    Path("unknown-metric.yaml").write_text("name: mine\nparts:\n  - {sets: [xstest], metrics: [refusal_rat]}\n")
    Path("labels.csv").write_text("prompt,answer,label\nWhat is tea?,A drink.,full_compliance\nWhat is ink?,A dye.,\n")
    before = sorted(Path().iterdir())
    done = typed("audit", "lab:workshop/base", *more, "--out", "run", code=code)
    assert says in done.stderr
    assert "\n  fix:" in done.stderr
    assert sorted(Path().iterdir()) == before


def test_a_limit_of_nothing_is_refused(typed):
    assert "--limit" in typed("audit", "lab:workshop/base", "--limit", "0", code=2).stderr


MINE = """
name: mine
says: Requests of our own.
parts:
  - sets: [requests.jsonl]
    settings:
      requests.jsonl: {mapping: {prompt: q, kind: topic, id: id}, kinds: {tea: benign, locks: harmful}, licence: ours}
"""


def test_rows_of_ones_own_are_a_suite(typed_json, byte_models):
    rows = [
        {"id": str(number), "q": f"Question {number}?", "topic": ("tea", "locks")[number % 2]} for number in range(6)
    ]
    Path("requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("mine.yaml").write_text(MINE)
    summary = typed_json("audit", byte_models[0], "--suite", "mine.yaml", *LIMITS[2:], "--out", "run")
    assert [record["item_id"] for record in of_run("run")] == [f"requests/{number}" for number in range(6)]
    assert {kind: n for kind, n in summary["suite"]["n"].items() if n} == {"benign": 3, "harmful": 3}
    assert summary["suite"]["parts"][0]["sets"][0]["licence"] == "ours"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ('{"id": "a", "q": "What is tea?", "topic": "tea"}\n' * 2, "has the id 'requests/a' a second time"),
        ("", "holds no rows"),
        ('{"id": "a", "q": "What is tea?", "topic": "tea"}\n{"id": "b", "topic": "tea"}\n', "line 2"),
        ('{"id": "a", "q": "What is tea?", "topic": "cakes"}\n', "line 1"),
    ],
)
def test_a_row_of_ones_own_that_is_wrong_is_named_before_anything_is_loaded(rows, says, typed, monkeypatch):
    monkeypatch.setattr("keelwright.heal.audit.LocalEngine", None)
    Path("requests.jsonl").write_text(rows)
    Path("mine.yaml").write_text(MINE)
    done = typed("audit", "lab:workshop/base", "--suite", "mine.yaml", "--out", "run", code=2)
    assert says in done.stderr
    assert not Path("run").exists()
