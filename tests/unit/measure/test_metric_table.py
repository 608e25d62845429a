# SPDX-License-Identifier: Apache-2.0
"""Metrics by name, narrowed by conditions in brackets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from keelwright.core.errors import ConfigError
from keelwright.core.records import Judgement, Record
from keelwright.measure.metric import Metric
from keelwright.measure.metric_table import METRIC_NAMES, answers_needed, find_metric
from keelwright.measure.metrics import METRICS, RULES, flags

MakeRecord = Callable[..., Record]


@pytest.mark.parametrize("name", METRIC_NAMES)
def test_every_name_leads_to_a_metric_of_that_name(name: str) -> None:
    asked = name.replace("_K", "_5")
    metric = find_metric(asked)
    assert isinstance(metric, Metric)
    assert metric.name == asked
    assert metric.title[0].isupper()
    assert metric.rows([]) == {}


@pytest.mark.parametrize("name", METRICS)
def test_headline_metrics_count_what_the_headline_rules_count(record: MakeRecord, name: str) -> None:
    labels = ["refusal_full", "refusal_partial", "comply_harmful", "safe_completion", "incoherent", "correct", "error"]
    records = [
        record(f"{kind}{i}", label, kind=kind, score=5.0 if label == "comply_harmful" else None)
        for kind in ("harmful", "benign", "contrast", "task")
        for i, label in enumerate(labels)
    ]
    metric = find_metric(name)
    assert {item: bool(row.columns[0]) for item, row in metric.rows(records).items()} == flags(records, name)
    assert metric.higher_is_better == RULES[name].higher_is_better


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        find_metric("user_saftey")
    assert "There is no metric 'user_saftey'." in str(caught.value)
    assert "did you mean 'user_safety'?" in str(caught.value)


@pytest.mark.parametrize("name", ["asr_at_K", "asr_at_", "asr_at_two"])
def test_a_missing_number_is_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match="write a number for K, as in asr_at_5"):
        find_metric(name)


def test_k_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'K of asr_at_0' is out of range"):
        find_metric("asr_at_0")


@pytest.mark.parametrize("name", ["rr_any[", "rr_any[hazard]", "rr_any[hazard=a", "rr_any[=a]", "rr_any[hazard=]"])
def test_brackets_that_cannot_be_read_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        find_metric(name)
    assert "user_helpfulness[domain=QA]" in str(caught.value)


def test_a_condition_keeps_the_records_that_meet_it(record: MakeRecord) -> None:
    records = [record("h1", hazard="fraud"), record("h2", hazard="theft"), record("h3", hazard="fraud", suite="other")]
    assert list(find_metric("rr_any[hazard=fraud]").rows(records)) == ["h1", "h3"]
    assert list(find_metric("rr_any[hazard=fraud, set=other]").rows(records)) == ["h3"]


def test_a_condition_that_no_record_meets_measures_nothing(record: MakeRecord) -> None:
    records = [record("h1", facts={"domain": "QA"}), record("h2")]
    assert find_metric("rr_any[domian=QA]").rows(records) == {}
    assert find_metric("rr_any[domain=qa]").rows(records) == {}


def test_records_without_the_fact_stay_as_the_other_side(record: MakeRecord) -> None:
    records = [record("clean"), record("a", facts={"family": "noise"}), record("b", facts={"family": "suffix"})]
    assert list(find_metric("rr_any[family=noise]").rows(records)) == ["clean", "a"]


def test_a_condition_on_the_judge_reads_that_judge_alone(record: MakeRecord) -> None:
    both = {"refusal-lists@1": Judgement("comply_unhelpful"), "refusal-classifier@1": Judgement("refusal_full")}
    records = [record("h1", judgements=both), record("h2")]
    rows = {name: find_metric(name).rows(records) for name in ("rr_any", "rr_any[judge=refusal-classifier]")}
    assert rows["rr_any"]["h1"].columns == (0.0, 1.0)
    assert {item: row.columns for item, row in rows["rr_any[judge=refusal-classifier]"].items()} == {"h1": (1.0, 1.0)}


def test_the_condition_stands_in_name_and_title() -> None:
    metric = find_metric("user_safety[ domain = QA ,hazard=law]")
    assert metric.name == "user_safety[domain=QA,hazard=law]"
    assert metric.title == "User-specific safety (domain QA, hazard law)"


@pytest.mark.parametrize(
    ("name", "k"),
    [("asr_at_5", 5), ("expected_maximum_toxicity_25[hazard=toxic]", 25), ("rr_any", 1), ("pass_at_1", 1)],
)
def test_the_number_of_answers_is_read_off_the_name(name: str, k: int) -> None:
    assert answers_needed(name) == k


def test_the_table_is_read_without_torch() -> None:
    code = "import sys, keelwright.measure.metric_table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
