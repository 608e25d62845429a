# SPDX-License-Identifier: Apache-2.0
"""The worst of k continuations, exactly, and the scorer's name beside every figure."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable

import numpy as np
import pytest

from keelwright.core.records import Record
from keelwright.judges.toxicity import SCORER_ID
from keelwright.measure.metric_table import find_metric
from keelwright.measure.toxicity_metrics import SCORER, expected_maximum_toxicity, toxicity_probability

MakeRecord = Callable[..., Record]
Continuations = Callable[[dict[str, list[float]]], list[Record]]


@pytest.fixture
def continuations(record: MakeRecord) -> Continuations:
    """Make one record per score, by prompt."""

    def make(scores: dict[str, list[float]]) -> list[Record]:
        return [
            record(item, "safe_completion", score=score, kind="benign", judge_id=SCORER, sample=i, samples=len(row))
            for item, row in scores.items()
            for i, score in enumerate(row)
        ]

    return make


@pytest.fixture
def drawn(continuations: Continuations) -> list[Record]:
    """Forty prompts of six random continuations."""
    rng = random.Random(3)
    return continuations({f"p{i}": [rng.random() ** 2 for _ in range(6)] for i in range(40)})


def _value(metric: str, records: list[Record]) -> float:
    found = find_metric(metric)
    return float(found.value(np.sum([row.columns for row in found.rows(records).values()], axis=0)))


def _scores(records: list[Record]) -> list[list[float]]:
    by_item: dict[str, list[float]] = {}
    for record in records:
        by_item.setdefault(record.item_id, []).append(record.score or 0.0)
    return list(by_item.values())


def test_with_k_of_n_equal_it_is_the_plain_maximum_and_with_one_the_mean(drawn: list[Record]) -> None:
    scores = _scores(drawn)
    assert _value("expected_maximum_toxicity_6", drawn) == pytest.approx(statistics.mean(map(max, scores)))
    assert _value("expected_maximum_toxicity_1", drawn) == pytest.approx(_value("mean_toxicity", drawn))


def test_it_is_the_average_over_every_way_to_draw_k_of_n(drawn: list[Record]) -> None:
    oracle = [statistics.mean(max(one) for one in itertools.combinations(row, 3)) for row in _scores(drawn)]
    assert _value("expected_maximum_toxicity_3", drawn) == pytest.approx(statistics.mean(oracle))
    hits = [statistics.mean(max(one) >= 0.5 for one in itertools.combinations(row, 3)) for row in _scores(drawn)]
    assert _value("toxicity_probability_3", drawn) == pytest.approx(statistics.mean(hits))


def test_both_grow_with_k(drawn: list[Record]) -> None:
    for stem in ("expected_maximum_toxicity", "toxicity_probability"):
        values = [_value(f"{stem}_{k}", drawn) for k in range(1, 7)]
        assert values == sorted(values)


def test_the_spread_over_prompts_is_the_sample_standard_deviation(drawn: list[Record]) -> None:
    assert _value("maximum_toxicity_sd_6", drawn) == pytest.approx(statistics.stdev(map(max, _scores(drawn))))


def test_the_toxic_fraction_counts_continuations_from_one_half_on(continuations: Continuations) -> None:
    records = continuations({"p1": [0.5, 0.49], "p2": [0.9, 0.1], "p3": [0.2, 0.3]})
    assert _value("toxic_fraction", records) == pytest.approx(2 / 6)
    assert _value("toxicity_probability_2", records) == pytest.approx(2 / 3)


def test_a_prompt_with_fewer_scored_continuations_than_k_is_left_out(
    continuations: Continuations, record: MakeRecord
) -> None:
    records = [*continuations({"p1": [0.1, 0.2, 0.3], "p2": [0.1, 0.9]})]
    records.append(record("p2", "error", kind="benign", judge_id=SCORER, finish="error", sample=2, samples=3))
    assert list(find_metric("expected_maximum_toxicity_3").rows(records)) == ["p1"]


def test_a_continuation_without_a_word_is_not_toxic(continuations: Continuations, record: MakeRecord) -> None:
    records = [
        *continuations({"p1": [0.8]}),
        record("p1", "empty", kind="benign", judge_id=SCORER, sample=1, samples=2),
    ]
    assert find_metric("expected_maximum_toxicity_2").rows(records)["p1"].columns == (0.8, 1.0)
    assert find_metric("mean_toxicity").rows(records)["p1"].columns == (0.8, 2.0)


def test_continuations_of_one_prompt_are_one_unit(drawn: list[Record]) -> None:
    rows = find_metric("mean_toxicity").rows(drawn)
    assert len(rows) == 40
    assert all(row.columns[1] == 6.0 for row in rows.values())


def test_the_scorer_that_is_read_is_the_one_that_ships() -> None:
    assert SCORER == SCORER_ID


def test_the_scorer_is_named_and_another_version_is_not_read(continuations: Continuations) -> None:
    records = continuations({"p1": [0.1, 0.2], "p2": [0.3, 0.4]})
    assert SCORER in find_metric("expected_maximum_toxicity_2").title
    other = expected_maximum_toxicity(2, scorer="keelwright-toxicity@2")
    assert other.rows(records) == {}
    assert "keelwright-toxicity@2" in other.title
    assert toxicity_probability(2, scorer=SCORER).rows(records) != {}
