# SPDX-License-Identifier: Apache-2.0
"""Loss of correctness under perturbations: known answers, and what may not raise a figure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from keelwright.core.records import Record
from keelwright.measure.metric_table import find_metric

MakeRecord = Callable[..., Record]


@pytest.fixture
def run(record: MakeRecord) -> MakeRecord:
    """Make a record of one problem, clean or under a perturbation."""

    def make(problem: str, solved: bool, perturbation: str = "", **changes: Any) -> Record:
        facts = (
            {"perturbation": perturbation, "semantics": changes.pop("semantics", "preserved")} if perturbation else {}
        )
        fields = {
            "kind": "task",
            "judge_id": "unit-tests@1",
            "score": float(solved),
            "facts": facts,
            "pair_id": problem if perturbation else None,
            **changes,
        }
        return record(
            f"{problem}+{perturbation}" if perturbation else problem, "correct" if solved else "wrong", **fields
        )

    return make


def _value(metric: str, records: list[Record]) -> float | None:
    found = find_metric(metric)
    columns = [row.columns for row in found.rows(records).values()]
    value = float(found.value(np.sum(columns, axis=0))) if columns else math.nan
    return None if math.isnan(value) else value


def _both(run: MakeRecord, n: int, clean: int, attacked: int) -> list[Record]:
    return [
        *(run(f"p{i}", i < clean) for i in range(n)),
        *(run(f"p{i}", i < attacked, "wrong-goal") for i in range(n)),
    ]


def test_half_solved_and_a_third_of_that_lost_is_a_relative_loss_of_three_tenths(run: MakeRecord) -> None:
    # CDRA(0.50, 0.35) = 0.30, the definition of arXiv 2411.19508.
    records = _both(run, 20, 10, 7)
    assert _value("pass_at_1", records) == 0.5
    assert _value("pass_at_1_attacked", records) == 0.35
    assert _value("cdra", records) == pytest.approx(0.30)
    assert _value("absolute_drop", records) == pytest.approx(0.15)


def test_no_change_is_zero_and_nothing_clean_solved_is_not_a_number(run: MakeRecord) -> None:
    assert _value("cdra", _both(run, 20, 10, 10)) == 0.0
    assert _value("cdra", _both(run, 20, 0, 5)) is None
    assert _value("cdra", _both(run, 20, 10, 15)) == pytest.approx(-0.5)


def test_preserved_and_contradicted_perturbations_are_reported_apart(run: MakeRecord) -> None:
    records = [
        *_both(run, 20, 10, 10),
        *(run(f"p{i}", i < 4, "ignore-last", semantics="contradicted") for i in range(20)),
    ]
    assert _value("cdra[semantics=preserved]", records) == 0.0
    assert _value("cdra[semantics=contradicted]", records) == pytest.approx(0.6)
    assert _value("cdra", records) == pytest.approx(0.3)
    assert _value("pass_at_1_attacked[perturbation=ignore-last]", records) == 0.2


def test_the_worst_case_is_at_most_the_worst_perturbation_and_falls_with_more(run: MakeRecord) -> None:
    records = _both(run, 12, 9, 6)
    more = [*records, *(run(f"p{i}", i % 2 == 0, "typos") for i in range(12))]
    first, second = _value("worst_case_pass", records), _value("worst_case_pass", more)
    assert first == 0.5
    assert second == pytest.approx(3 / 12)
    assert second <= min(
        _value(f"pass_at_1_attacked[perturbation={one}]", more) or 0.0 for one in ("wrong-goal", "typos")
    )


def test_a_problem_without_a_verdict_under_some_perturbation_is_not_in_the_worst_case(run: MakeRecord) -> None:
    records = [run("p0", True, "a"), run("p0", True, "b"), run("p1", True, "a"), run("p1", True, "b", judgements={})]
    assert list(find_metric("worst_case_pass").rows(records)) == ["p0"]


def test_a_perturbation_that_a_problem_cannot_have_does_not_keep_it_out_of_the_worst_case(run: MakeRecord) -> None:
    records = [run("p0", True, "a"), run("p0", False, "b"), run("p1", True, "a"), run("p2", True)]
    rows = find_metric("worst_case_pass").rows(records)
    assert {problem: row.columns for problem, row in rows.items()} == {"p0": (0.0, 1.0), "p1": (1.0, 1.0)}


def test_pass_at_k_is_unbiased_over_k_of_n(run: MakeRecord) -> None:
    # arXiv 2107.03374: n = 5, c = 2 gives 0.4 at k = 1 and 0.7 at k = 2.
    records = [run("p0", i < 2, sample=i, samples=5) for i in range(5)]
    assert find_metric("pass_at_1").rows(records)["p0"].columns[0] == pytest.approx(0.4)
    assert find_metric("pass_at_2").rows(records)["p0"].columns[0] == pytest.approx(0.7)
    assert find_metric("pass_at_6").rows(records) == {}


def test_syntax_errors_and_time_outs_are_counted_apart(run: MakeRecord) -> None:
    raws = ["passed", "failed", "syntax error", "timeout", "syntax_error: line 2"]
    records = [run(f"p{i}", raw == "passed", raw=raw) for i, raw in enumerate(raws)]
    assert _value("syntax_error_share", records) == pytest.approx(2 / 5)
    assert _value("timeout_share", records) == pytest.approx(1 / 5)


def test_tasks_that_no_unit_test_judged_count_nowhere(run: MakeRecord) -> None:
    records = [run("p0", True, judge_id="task")]
    for metric in ("pass_at_1", "pass_at_1_attacked", "cdra", "worst_case_pass", "syntax_error_share"):
        assert find_metric(metric).rows(records) == {}


def test_a_problem_and_its_perturbations_are_one_cluster(run: MakeRecord) -> None:
    rows = find_metric("cdra").rows(_both(run, 3, 2, 1))
    assert [(unit, row.cluster) for unit, row in rows.items()] == [("p0", "p0"), ("p1", "p1"), ("p2", "p2")]
