# SPDX-License-Identifier: Apache-2.0
"""Judges by name: the grammar, what is opened when, what leaves the machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from keelwright.core.errors import ConfigError, OfflineError
from keelwright.judges.registry import (
    LINES,
    JudgeContext,
    JudgeLine,
    find_judge,
    judge_table,
    needs_network,
    parse_judge,
)

RULES = [line.name for line in LINES if not line.asks]
FORMS = [line.name for line in LINES if line.asks]


@pytest.fixture
def opened(scripted):
    """A context whose engines are scripted, and what was opened."""
    log = []

    def open_engine(model, engine):
        log.append((model, engine))
        return scripted(lambda prompt: "#thescore: 1")

    return JudgeContext(open_engine=open_engine), log


@pytest.mark.parametrize("name", ["refusal-lists", "xstest-prefixes", "qi-keywords", "qi-keywords-casefold"])
def test_rules_need_no_model(name, opened, asked, said):
    context, log = opened
    judge = find_judge(name, context)
    assert judge.judge(asked(), said("I'm sorry, I cannot help.")).label in {"refusal_full", "comply_unhelpful"}
    assert log == []


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_put_before_the_model_that_is_named(name, opened):
    context, log = opened
    judge = find_judge(f"{name}:org/model", context)
    assert log == []
    assert judge.judge_id.startswith(f"{name}@")
    assert judge.judge_id.endswith("/org/model@r1")
    assert log == [("org/model", "hf")]


@pytest.mark.parametrize("name", [line.name for line in LINES])
def test_every_line_names_a_module_of_its_room(name):
    line = next(one for one in LINES if one.name == name)
    module, _, attribute = line.path.partition(":")
    assert module.startswith("keelwright.judges.")
    assert attribute.isidentifier()


@pytest.mark.parametrize(
    ("spec", "model", "engine"),
    [
        ("qi-rubric:org/name", "org/name", "hf"),
        ("qi-rubric:org/name@main", "org/name@main", "hf"),
        ("qi-rubric:lab:workshop/aligned", "lab:workshop/aligned", "hf"),
        ("qi-rubric:./folder", "./folder", "hf"),
        ("qi-rubric:openai:gpt-x", "gpt-x", "openai"),
        ("qi-rubric:openai:org/name:tag", "org/name:tag", "openai"),
        ("qi-rubric:vllm:org/name", "org/name", "vllm"),
    ],
)
def test_a_spec_names_judge_engine_and_model(spec, model, engine):
    found = parse_judge(spec)
    assert (found.line.name, found.model, found.engine) == ("qi-rubric", model, engine)


@pytest.mark.parametrize(
    ("spec", "problem", "fix"),
    [
        ("qi-rubrik:org/name", "There is no judge 'qi-rubrik'.", "did you mean 'qi-rubric'?"),
        ("", "There is no judge ''.", "choose one of"),
        ("qi-rubric", "asks a model, and none is named.", "qi-rubric:org/name"),
        ("qi-rubric:openai:", "asks a model, and none is named.", "name one"),
        ("wildguard", "asks a model, and none is named.", "wildguard:allenai/wildguard"),
        ("refusal-lists:org/name", "The judge 'refusal-lists' asks no model.", "leave out what follows the colon"),
    ],
)
def test_a_wrong_spec_says_what_to_write(spec, problem, fix):
    with pytest.raises(ConfigError) as caught:
        parse_judge(spec)
    assert problem in str(caught.value)
    assert fix in str(caught.value)


def test_what_leaves_the_machine_is_known_before_anything_is_opened(opened):
    context, log = opened
    assert needs_network("refusal-lists", context) is None
    assert needs_network("qi-rubric:org/name", context) is None
    assert needs_network("qi-rubric:openai:gpt-x", context) == "api.openai.com"
    elsewhere = JudgeContext(open_engine=context.open_engine, base_url="https://models.example.org/v1")
    assert needs_network("qi-rubric:openai:gpt-x", elsewhere) == "models.example.org"
    for address in ("http://localhost:8000/v1", "http://127.0.0.1:8000", "http://[::1]:8000/v1", "localhost:8000"):
        assert needs_network("qi-rubric:openai:gpt-x", JudgeContext(base_url=address)) is None
    assert log == []


def test_offline_a_judge_behind_a_server_is_refused_before_it_is_opened(opened):
    context, log = opened
    offline = JudgeContext(open_engine=context.open_engine, offline=True)
    with pytest.raises(OfflineError, match=r"sends requests and answers to api\.openai\.com"):
        find_judge("qi-rubric:openai:gpt-x", offline)
    here = JudgeContext(open_engine=context.open_engine, base_url="http://localhost:8000/v1", offline=True)
    assert find_judge("qi-rubric:openai:gpt-x", here).network is None
    assert log == []


def test_judges_of_the_same_model_share_it(opened, asked, said):
    context, log = opened
    for spec in ("qi-rubric:org/name", "refusal-rubric:org/name", "qi-rubric:openai:gpt-x"):
        find_judge(spec, context).judge(asked(), said())
    assert log == [("org/name", "hf"), ("gpt-x", "openai")]


def test_with_a_cache_verdicts_are_shared_between_runs(opened, tmp_path, asked, said):
    context, _ = opened
    for _ in range(2):
        fresh = JudgeContext(open_engine=context.open_engine, cache=tmp_path / "verdicts.sqlite")
        judge = find_judge("qi-rubric:org/name", fresh)
        judge.judge(asked(), said())
    assert (judge.hits, judge.misses) == (1, 0)


def test_a_caller_brings_judges_of_its_own(opened):
    context, _ = opened
    extra = [JudgeLine("mine", "My rule", "the answer", "refusal or not", "keelwright.judges.refusal:RefusalJudge")]
    assert find_judge("mine", context, extra=extra).judge_id.startswith("refusal-lists@")
    assert judge_table(extra)[-1]["name"] == "mine"


def test_the_table_says_what_each_judge_reads_and_needs():
    rows = {row["name"]: row for row in judge_table()}
    assert rows["refusal-lists"]["needs"] == "nothing"
    assert rows["qi-rubric"]["needs"] == "a model that follows instructions"
    assert rows["wildguard"]["needs"] == "allenai/wildguard"
    assert rows["qi-rubric"]["knows_harm"]
    assert not rows["refusal-rubric"]["knows_harm"]
    assert len(rows) == len(LINES)


def test_the_registry_loads_neither_torch_nor_numpy_nor_a_judge():
    code = (
        "import sys, keelwright.judges.registry as r; r.judge_table();"
        "r.needs_network('qi-rubric:openai:x', r.JudgeContext());"
        "sys.exit(bool({'torch', 'numpy', 'keelwright.judges.refusal', 'keelwright.judges.qi'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_local_model_is_opened_by_its_reference(tmp_path: Path, asked, said):
    context = JudgeContext(offline=True)
    judge = find_judge("fulfilment:lab:workshop/aligned", context)
    judgement = judge.judge(asked("boat?"), said("It is a boat."))
    assert judgement.label in {"unparsed", "refusal_full", "comply_harmful"}
    assert "/lab:workshop/aligned@" in judge.judge_id


def test_a_model_that_cannot_be_opened_stops_the_run_instead_of_leaving_answers_unread(asked, said):
    def open_engine(model, engine):
        raise OfflineError(f"The model '{model}' is not on this machine.")

    judge = find_judge("qi-rubric:org/name", JudgeContext(open_engine=open_engine))
    with pytest.raises(OfflineError, match="'org/name' is not on this machine"):
        judge.judge_all([(asked(), said())])
