# SPDX-License-Identifier: Apache-2.0
"""The demo as a user sees it: one command, the promised effect, the files, and the commands that read them."""

import json

import pytest

MODEL_KEYS = {"harm_rate", "refusal_rate", "over_refusal", "answer_rate", "incoherent", "utility"}


@pytest.fixture(scope="module")
def demo(keelwright, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("user")
    done = keelwright("demo", "--out", "demo-run", "--json", "--quiet", cwd=cwd)
    assert done.stderr == ""
    return cwd, json.loads(done.stdout)


def test_default_seed_shows_the_promised_story(demo):
    _, summary = demo
    aligned, tuned, repaired = (summary["models"][role] for role in ("aligned", "tuned", "repaired"))
    assert summary["verdict"] == "repaired"
    assert tuned["harm_rate"]["value"] >= aligned["harm_rate"]["value"] + 0.5
    assert repaired["harm_rate"]["value"] <= tuned["harm_rate"]["value"] / 3
    assert repaired["utility"]["value"] >= 0.95 * tuned["utility"]["value"]
    assert repaired["answer_rate"]["value"] >= 0.95


def test_json_contract(demo):
    cwd, summary = demo
    assert summary["schema"] == 1
    assert summary["command"] == "demo"
    assert summary == json.loads((cwd / summary["run"] / "summary.json").read_text())
    assert set(summary["models"]) == {"aligned", "tuned", "repaired"}
    for model in summary["models"].values():
        assert set(model) == MODEL_KEYS
        for estimate in model.values():
            assert set(estimate) == {"value", "low", "high", "n"}
            assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
    methods = {trial["method"] for trial in summary["trials"]}
    assert methods == {"linear", "resta"}
    for trial in summary["trials"]:
        assert {"method", "coefficients", "metrics", "admissible", "reason"} <= set(trial)
        assert set(trial["metrics"]) == MODEL_KEYS
        assert trial["admissible"] == (trial["reason"] == "")
    assert summary["method"] in methods
    assert all(seconds >= 0 for seconds in summary["seconds"].values())


def test_selection_and_verification_never_share_an_item(demo):
    cwd, summary = demo
    lines = (cwd / summary["run"] / "records.jsonl").read_text().split("\n")[:-1]
    by_model = {}
    for line in lines:
        record = json.loads(line)
        by_model.setdefault(record["model_id"], set()).add(record["item_id"])
    chosen = summary["model_ids"]["repaired"]
    others = {model for model in by_model if model not in ("aligned", "tuned", chosen)}
    selection = set.union(*(by_model[model] for model in others))
    assert by_model[chosen] == by_model["aligned"] == by_model["tuned"]
    assert selection < by_model["aligned"]
    verified = sum(summary["models"]["repaired"][name]["n"] for name in ("harm_rate", "answer_rate", "over_refusal"))
    verified += summary["models"]["repaired"]["utility"]["n"]
    assert verified == len(by_model["aligned"]) - len(selection)


def test_run_folder_holds_what_is_promised(demo):
    cwd, summary = demo
    run = cwd / summary["run"]
    assert {"run.json", "records.jsonl", "summary.json", "report.html", "inputs", "repaired"} <= {
        child.name for child in run.iterdir()
    }
    assert (run / "report.html").stat().st_size < 500_000
    assert (run / "repaired" / "model.safetensors").is_file()
    card = (run / "repaired" / "README.md").read_text()
    assert "safety not evaluated" not in card
    # The un-aligned copy is never saved: two models were written, the damaged and the repaired one.
    assert sorted(path.parent.name for path in run.rglob("model*.safetensors") if "training" not in str(path)) == [
        "repaired",
        "tuned",
    ]


def test_repaired_folder_opens_in_transformers_and_answers_as_reported(demo, keelwright_json):
    cwd, summary = demo
    audit = keelwright_json("audit", f"{summary['run']}/repaired", "--suite", "workshop", cwd=cwd)
    assert audit["metrics"]["harm_rate"]["value"] == pytest.approx(
        summary["models"]["repaired"]["harm_rate"]["value"], abs=0.08
    )


def test_same_command_on_the_finished_run_shows_its_result(demo, keelwright_json):
    cwd, summary = demo
    assert keelwright_json("demo", "--out", "demo-run", cwd=cwd) == summary


def test_runs_commands_read_the_folder(demo, keelwright, keelwright_json):
    cwd, summary = demo
    listed = keelwright_json("runs", "ls", ".", cwd=cwd)
    assert [(row["command"], row["verdict"]) for row in listed if row["command"] == "demo"] == [("demo", "repaired")]
    assert summary["sentence"] in " ".join(keelwright("runs", "show", "demo-run", cwd=cwd).stdout.split())
    before = (cwd / "demo-run" / "report.html").read_text()
    keelwright("runs", "report", "demo-run", cwd=cwd)
    assert (cwd / "demo-run" / "report.html").read_text() == before


def test_screen_shows_plan_progress_and_table(keelwright, demo):
    cwd, summary = demo
    shown = keelwright("runs", "show", "demo-run", cwd=cwd).stdout
    for words in ("harm rate", "ordinary requests answered", "aligned", "tuned", "repaired", "%"):
        assert words in shown
    assert summary["method"] in shown


@pytest.mark.parametrize(
    "words",
    [
        ("audit", "demo-run/repaired", "--suite", "workshop", "--limit", "4", "--out", "ja", "--quiet"),
        ("repair", "linear", "--aligned", "lab:workshop/aligned", "--tuned", "demo-run/inputs/tuned", "-q",
         "--out", "jr"),
        ("heal", "lab:workshop/aligned", "lab:workshop/aligned", "--no-utility", "--limit", "4", "--out", "jh", "-q"),
        ("compare", "demo-run", "demo-run"),
        ("methods",),
        ("methods", "resta"),
        ("lab", "list"),
        ("lab", "show", "lab:workshop/aligned"),
        ("runs", "ls", "."),
        ("runs", "show", "demo-run"),
        ("runs", "report", "demo-run"),
    ],
    ids=lambda words: " ".join(words[:2]),
)  # fmt: skip
def test_json_is_one_document_and_quiet_is_silent(words, demo, keelwright):
    done = keelwright(*words, "--json", cwd=demo[0])
    json.loads(done.stdout)
    assert done.stderr == ""


@pytest.mark.slow
def test_replay_gives_the_same_result(demo, keelwright_json):
    cwd, _ = demo
    outcome = keelwright_json("runs", "replay", "demo-run", "--out", "again", cwd=cwd)
    assert outcome["differing"] == []
