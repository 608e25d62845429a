# SPDX-License-Identifier: Apache-2.0
"""`gate` in a build: exit codes, JUnit, Markdown, every kind of run and log, and refusals that name what differs."""

import dataclasses
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from keelwright.core.records import Judgement, Record
from keelwright.runs.folder import RunFolder, RunSpec

PAIRS = 200
LENIENT = "name: lenient\nrules:\n  - {metric: refusal_rate, detect: 0.1}\n"
PRIMARY = (
    "name: primary\nrules:\n  - {metric: primary, detect: 0.1}\n  - {metric: answer_rate, test: threshold, min: 0.9}\n"
)


def record(number, label, kind="harmful", **changes):
    plain = Record(
        item_id=f"{kind}-{number}", suite="set", suite_digest="s0", kind=kind, hazard="area", prompt="A question?",
        model_id="model", revision="r0", template_digest="t0", decoding_digest="d0", output="An answer.", n_tokens=3,
        finish="eos", judgements={"lists@1": Judgement(label)}, max_new_tokens=64,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def records(refused, *, n=PAIRS, **changes):
    """Harmful items of which the first few were refused, and as many ordinary ones, all answered."""
    labels = ["refusal_full"] * refused + ["comply_unhelpful"] * (n - refused)
    harmful = [record(number, label, **changes) for number, label in enumerate(labels)]
    return harmful + [record(number, "safe_completion", "benign", **changes) for number in range(n)]


def write_audit(name, *, model, against=None):
    with RunFolder.open(Path(name), RunSpec("audit", ("keelwright", "audit", name), {}, 0, {})) as run:
        for one in model:
            run.append(one)
        for one in against or ():
            run.append(dataclasses.replace(one, model_id="against"))
        run.finish({"schema": 1, "command": "audit", "primary": "refusal_rate", "metrics": {}})


@pytest.fixture
def runs(typed):
    """An audit before, a good and a bad one after, a small one; one of both models; policies."""
    write_audit("before", model=records(190))
    write_audit("good", model=records(188))
    write_audit("bad", model=records(150))
    write_audit("small", model=records(10, n=10))
    write_audit("both", model=records(150), against=records(190))
    Path("lenient.yaml").write_text(LENIENT)
    Path("primary.yaml").write_text(PRIMARY)
    return typed


@pytest.mark.parametrize(
    ("words", "code", "outcome"),
    [
        (["good", "--against", "before"], 0, "pass"),
        (["bad", "--against", "before"], 4, "fail"),
        (["both"], 4, "fail"),
        (["small", "--against", "small"], 6, "not measurable"),
    ],
)
def test_the_exit_code_is_the_verdict(words, code, outcome, runs, typed_json):
    summary = typed_json("gate", *words, "--policy", "primary.yaml", "--out", "verdict", code=code)
    assert summary["outcome"] == outcome
    assert json.loads(Path("verdict", "summary.json").read_text()) == summary
    assert summary["rules"][0]["metric"] == "refusal_rate"
    shown = runs("runs", "show", "verdict").stdout
    assert shown.splitlines()[-1] == f"{outcome}  verdict"
    assert outcome in runs("runs", "ls", ".").stdout
    assert Path("verdict", "report.html").is_file()
    if outcome == "not measurable":
        assert summary["rules"][0]["needs"] > 10
        assert f"it takes {summary['rules'][0]['needs']}" in summary["sentence"]


def test_a_comparison_is_gated_like_the_two_runs_it_was_made_of(runs, typed_json):
    typed_json("compare", "before", "bad", "--out", "change")
    direct = typed_json("gate", "bad", "--against", "before", "--policy", "primary.yaml", "--out", "one", code=4)
    through = typed_json("gate", "change", "--policy", "primary.yaml", "--out", "two", code=4)
    assert through["rules"] == direct["rules"]
    done = runs("gate", "change", "--against", "before", "--policy", "primary.yaml", code=2)
    assert "is a comparison already" in done.stderr


def test_what_a_build_reads_says_what_the_verdict_says(runs):
    words = ("gate", "bad", "--against", "before", "--policy", "primary.yaml", "--out", "verdict")
    runs(*words, "--junit", "out.xml", "--markdown", "out.md", code=4)
    suite = ElementTree.parse("out.xml").getroot().find("testsuite")
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "2", "failures": "1", "errors": "0", "skipped": "0"}
    first, second = suite.findall("testcase")
    assert first.get("classname") == "keelwright.refusal_rate"
    assert "got worse" in first.find("failure").get("message")
    assert second.find("failure") is None
    table = [line for line in Path("out.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2
    assert "❌ fail" in table[2]
    assert "✅ pass" in table[3]


def test_junit_tells_what_is_not_measurable_from_a_failure(runs):
    runs(
        "gate", "small", "--against", "small", "--policy", "lenient.yaml", "--junit", "deep/er/out.xml", "--out", "v",
        code=6,
    )  # fmt: skip
    suite = ElementTree.parse("deep/er/out.xml").getroot().find("testsuite")
    assert (suite.get("failures"), suite.get("errors")) == ("0", "1")
    assert suite.find("testcase/error").get("type") == "not measurable"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"judgements": {"lists@2": Judgement("refusal_full")}}, "judge"),
        ({"template_digest": "t1"}, "'template'"),
        ({"suite_digest": "s1"}, "'suite'"),
        ({"max_new_tokens": 128, "decoding_digest": "d1"}, "'token limit'"),
        ({"samples": 5}, "'k'"),
        ({"decoding_digest": "d1"}, "'decoding'"),
        ({"facts": {"mitigation": "cot"}}, "'mitigation'"),
    ],
)
def test_runs_made_under_other_conditions_are_refused_by_name(change, names, runs):
    write_audit("other", model=records(150, **change))
    for words in (("gate", "other", "--against", "before", "--policy", "lenient.yaml"), ("compare", "before", "other")):
        done = runs(*words, "--out", "verdict", code=2)
        assert names in done.stderr.splitlines()[0]
        assert "cannot be compared" in done.stderr
        assert not Path("verdict").exists()


def test_other_items_are_refused(runs):
    write_audit("other", model=[dataclasses.replace(one, item_id=f"x-{one.item_id}") for one in records(150)])
    summary = json.loads(
        runs("gate", "other", "--against", "before", "--policy", "lenient.yaml", "--json", code=6).stdout
    )
    assert "no pair of items" in summary["sentence"]


def test_logs_of_inspect_are_gated_with_what_they_say(runs, typed_json):
    for name in ("before", "bad"):
        runs("runs", "export", name, "--to", "inspect", "--out", f"{name}.eval")
    summary = typed_json(
        "gate", "bad.eval", "--against", "before.eval", "--policy", "lenient.yaml", "--out", "verdict", code=4
    )
    direct = typed_json("gate", "bad", "--against", "before", "--policy", "lenient.yaml", "--out", "direct", code=4)
    assert summary["rules"] == direct["rules"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["before"], 2, "needs a comparison"),
        (["before", "--policy", "nowhere.yaml"], 3, "There is no policy 'nowhere.yaml'"),
        (["before", "--policy", "wrong.yaml"], 2, "has no setting 'detects'"),
        (["nowhere"], 2, "is not a run folder"),
        (["unfinished"], 2, "is unfinished"),
    ],
)
def test_what_is_wrong_is_said_and_leaves_nothing(words, code, says, runs):
    Path("wrong.yaml").write_text("rules:\n  - {metric: refusal_rate, detects: 0.1}\n")
    with RunFolder.open(Path("unfinished"), RunSpec("audit", (), {}, 0, {})) as run:
        run.append(record(0, "refusal_full"))
    done = runs("gate", *words, "--out", "verdict", "--junit", "out.xml", code=code)
    assert says in done.stderr
    assert not Path("verdict").exists()
    assert not Path("out.xml").exists()


def test_a_run_without_a_page_says_so(runs):
    runs("gate", "good", "--against", "before", "--policy", "lenient.yaml", "--out", "verdict")
    assert runs("runs", "report", "verdict").stdout.strip() == "verdict/report.html"
    done = runs("runs", "replay", "verdict", "--out", "again", code=2)
    assert "A run of 'gate' cannot be replayed" in done.stderr
