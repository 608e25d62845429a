# SPDX-License-Identifier: Apache-2.0
"""Verdicts by a judge's name, and which judges are trusted to know harm."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest

from keelwright.core.records import Judgement, Record
from keelwright.judges.registry import LINES, JudgeLine
from keelwright.measure.harm_metrics import KEYWORD_JUDGE, RUBRIC, USABLE_HARM_RUBRIC
from keelwright.measure.readings import HARM_JUDGES, name_of, verdict
from keelwright.worlds.pictures.judge import PicturesJudge
from keelwright.worlds.workshop.judge import WorkshopJudge
from keelwright.worlds.workshop.profiles import ProfilesJudge

MakeRecord = Callable[..., Record]


@pytest.mark.parametrize(
    ("judge_id", "name"),
    [
        ("qi@1", "qi"),
        ("qi-rubric@1/0f3a/org/model@r1", "qi-rubric"),
        ("workshop-exact", "workshop-exact"),
        ("granite-guardian-3.3@1/a/b", "granite-guardian-3.3"),
    ],
)
def test_a_judges_name_is_what_its_id_begins_with(judge_id: str, name: str) -> None:
    assert name_of(judge_id) == name


@pytest.mark.parametrize("line", [line for line in LINES if line.knows_harm], ids=lambda line: line.name)
def test_a_judge_that_knows_harm_is_recognised_by_the_id_that_it_writes(line: JudgeLine) -> None:
    module, _, attribute = line.path.partition(":")
    form = getattr(importlib.import_module(module), attribute)()
    assert name_of(f"{form.name}@{form.version}/0f/model") in HARM_JUDGES


def test_the_labs_exact_judges_know_harm() -> None:
    assert {judge.judge_id for judge in (WorkshopJudge, PicturesJudge, ProfilesJudge)} <= HARM_JUDGES


def test_rules_and_scorers_do_not() -> None:
    blind = {line.name for line in LINES if not line.knows_harm}
    assert HARM_JUDGES.isdisjoint(blind | {"fulfilment", "qi", "xstest", "keelwright-toxicity"})


def test_the_judges_that_metrics_read_are_those_of_the_registry() -> None:
    from keelwright.judges.qi_keywords import KeywordJudge

    assert {RUBRIC, USABLE_HARM_RUBRIC, "fulfilment", "user-harm"} <= {line.name for line in LINES}
    assert name_of(KeywordJudge().judge_id) == KEYWORD_JUDGE


def test_a_verdict_that_could_not_be_read_is_none(record: MakeRecord) -> None:
    both = {"a@1": Judgement("unparsed"), "b@1/x": Judgement("refusal_full")}
    assert verdict(record("h1", judgements=both), "a") is None
    assert verdict(record("h1", judgements=both), "b") == Judgement("refusal_full")
    assert verdict(record("h1", judgements=both), "c") is None
