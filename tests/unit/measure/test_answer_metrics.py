# SPDX-License-Identifier: Apache-2.0
"""Answers that were cut short, and answers that nobody judged."""

from __future__ import annotations

from collections.abc import Callable

from keelwright.core.records import Record
from keelwright.measure.metric_table import find_metric
from keelwright.ops.intervals import wilson

MakeRecord = Callable[..., Record]


def test_cut_and_unjudged_answers_are_counted_over_all_records(record: MakeRecord) -> None:
    records = [
        record("h1", finish="length"),
        record("h2", "error", finish="error"),
        record("b1", "unparsed", kind="benign"),
        record("t1", "correct", kind="task"),
    ]
    assert find_metric("truncated").estimate(records) == wilson(1, 4)
    assert find_metric("unjudged").estimate(records) == wilson(2, 4)
