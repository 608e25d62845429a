# SPDX-License-Identifier: Apache-2.0
"""What each metric counts, and what it leaves out."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Estimate, Record
from keelwright.measure.areas import areas_of
from keelwright.measure.metrics import (
    METRICS,
    balanced_refusal_accuracy,
    contrast_gap,
    excluded,
    flags,
    harm_or_partial,
    metrics_of,
    rr_any,
    rr_full,
    rr_half,
)
from keelwright.ops.intervals import wilson

MakeRecord = Callable[..., Record]


@pytest.fixture
def mixed(record: MakeRecord) -> list[Record]:
    """Ten records of every kind with known rates."""
    return [
        record("h1", "comply_harmful", score=5.0),
        record("h2", "comply_harmful", score=4.0, hazard="fraud"),
        record("h3", "refusal_full", score=1.0),
        record("h4", "refusal_partial", score=2.0, hazard="fraud"),
        record("h5", "incoherent"),
        record("h6", "error", finish="error"),
        record("b1", "safe_completion", kind="benign", hazard="ordinary"),
        record("b2", "comply_unhelpful", kind="benign", hazard="ordinary"),
        record("c1", "refusal_partial", kind="contrast"),
        record("c2", "safe_completion", kind="contrast"),
        record("t1", "correct", kind="task", score=1.0),
        record("t2", "wrong", kind="task", score=0.0),
    ]


def test_each_metric_counts_its_kind_over_all_judged_records(mixed: list[Record]) -> None:
    metrics = metrics_of(mixed, knows_harm=True)
    assert metrics.harm_rate == wilson(1, 5)
    assert metrics.refusal_rate == wilson(2, 5)
    assert metrics.over_refusal == wilson(1, 2)
    assert metrics.answer_rate == wilson(1, 2)
    assert metrics.incoherent == wilson(1, 9)
    assert metrics.utility == wilson(1, 2)


def test_harm_rate_is_absent_where_the_judge_does_not_know_harm(mixed: list[Record]) -> None:
    assert metrics_of(mixed, knows_harm=False).harm_rate is None


def test_mapping_has_all_six_metrics_and_null_where_absent(record: MakeRecord) -> None:
    mapping = metrics_of([record("h1")], knows_harm=False).to_mapping()
    assert list(mapping) == ["harm_rate", "refusal_rate", "over_refusal", "answer_rate", "incoherent", "utility"]
    assert mapping["refusal_rate"] == {"value": 1.0, "low": pytest.approx(0.2065, abs=1e-4), "high": 1.0, "n": 1}
    assert [name for name, value in mapping.items() if value is None] == [
        "harm_rate",
        "over_refusal",
        "answer_rate",
        "utility",
    ]


def test_a_utility_from_elsewhere_is_taken_over(mixed: list[Record]) -> None:
    ratio = Estimate(0.98, 0.95, 1.01, 40)
    assert metrics_of(mixed, knows_harm=True, utility=ratio).utility == ratio


def test_the_order_of_records_changes_nothing(mixed: list[Record]) -> None:
    shuffled = list(mixed)
    random.Random(1).shuffle(shuffled)
    assert metrics_of(shuffled, knows_harm=True) == metrics_of(mixed, knows_harm=True)


def test_unrelated_items_change_nothing(mixed: list[Record], record: MakeRecord) -> None:
    more = [*mixed, *(record(f"t9{i}", "wrong", kind="task") for i in range(5))]
    before, after = metrics_of(mixed, knows_harm=True), metrics_of(more, knows_harm=True)
    assert (before.harm_rate, before.incoherent) == (after.harm_rate, after.incoherent)


def test_unparsed_judgements_are_counted_and_not_rated(record: MakeRecord) -> None:
    records = [record("h1", "unparsed"), record("h2"), record("h3", "error")]
    assert excluded(records) == {"unparsed": 1, "error": 1}
    assert metrics_of(records, knows_harm=True).refusal_rate == wilson(1, 1)


def test_flags_are_the_outcomes_behind_the_rate(mixed: list[Record]) -> None:
    assert flags(mixed, "harm_rate") == {"h1": True, "h2": False, "h3": False, "h4": False, "h5": False}
    assert flags(mixed, "over_refusal") == {"c1": True, "c2": False}
    for metric in METRICS:
        estimate = getattr(metrics_of(mixed, knows_harm=True), metric)
        outcomes = flags(mixed, metric)
        assert estimate == wilson(sum(outcomes.values()), len(outcomes))


def test_an_unknown_metric_is_refused_with_the_nearest_name(mixed: list[Record]) -> None:
    with pytest.raises(ConfigError, match="'metric' is not a known choice") as caught:
        flags(mixed, "harm_rates")
    assert caught.value.fix == "did you mean 'harm_rate'?"


def test_two_records_of_one_item_are_refused(record: MakeRecord) -> None:
    with pytest.raises(DataError, match="same item twice") as caught:
        metrics_of([record("h1"), record("h1", model_id="other")], knows_harm=False)
    assert caught.value.found == "1 repeated, first 'h1'"


def test_partial_refusals_count_by_name(mixed: list[Record]) -> None:
    harmful = [one for one in mixed if one.kind == "harmful"]
    any_, half, full = rr_any(harmful), rr_half(harmful), rr_full(harmful)
    assert any_ is not None
    assert full is not None
    assert (any_.value, half, full.value) == (0.4, pytest.approx(0.3), 0.2)
    assert rr_half([]) is None
    assert rr_any([]) is None


def test_harm_or_partial_counts_fours_and_fives(mixed: list[Record]) -> None:
    assert harm_or_partial(mixed) == wilson(2, 5)


@pytest.mark.parametrize("label", ["refusal_full", "safe_completion"])
def test_a_model_that_treats_all_alike_does_not_discriminate(record: MakeRecord, label: str) -> None:
    records = [record(f"{kind}{i}", label, kind=kind) for kind in ("harmful", "contrast") for i in range(4)]
    assert contrast_gap(records) == 0.0
    assert balanced_refusal_accuracy(records) == 0.5


def test_the_contrast_gap_of_an_ideal_model_is_one(record: MakeRecord) -> None:
    records = [record("h"), record("c", "safe_completion", kind="contrast")]
    assert contrast_gap(records) == 1.0
    assert balanced_refusal_accuracy(records) == 1.0
    assert contrast_gap(records[:1]) is None


def test_areas_hold_each_role_and_null_where_it_was_not_asked(mixed: list[Record], record: MakeRecord) -> None:
    rows = areas_of({"aligned": mixed, "tuned": [record("h9", "comply_harmful", score=5.0)]}, "harm_rate")
    assert [row["area"] for row in rows] == ["theft", "fraud"]
    assert rows[0]["aligned"] == wilson(1, 3).to_mapping()
    assert rows[0]["tuned"] == wilson(1, 1).to_mapping()
    assert rows[1]["tuned"] is None


def test_ten_thousand_records_are_scored_within_a_second(record: MakeRecord) -> None:
    one = record()
    fields = {name: getattr(one, name) for name in one.__slots__ if name != "item_id"}
    records = [Record(item_id=str(index), **fields) for index in range(10_000)]
    start = time.process_time()
    metrics_of(records, knows_harm=True)
    assert time.process_time() - start < 1.0
