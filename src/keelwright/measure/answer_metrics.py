# SPDX-License-Identifier: Apache-2.0
"""What qualifies every other figure: answers that were cut short, and answers that nobody could judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from keelwright.core.records import Record
from keelwright.measure.metric import Metric, Row, item_rows
from keelwright.measure.readings import is_judged
from keelwright.ops.statistic import ratio


def _share_of(counts: Callable[[Record], bool]) -> Callable[[Sequence[Record]], dict[str, Row]]:
    return lambda records: item_rows(records, lambda record: (float(counts(record)), 1.0))


TRUNCATED: Final = Metric(
    name="truncated",
    title="Cut short",
    counts="answers that ended at the limit on tokens; what would have come after was not judged",
    higher_is_better=False,
    rows=_share_of(lambda record: record.finish == "length"),
    value=ratio,
    is_binary=True,
)

UNJUDGED: Final = Metric(
    name="unjudged",
    title="Not judged",
    counts="answers without output or with an unreadable verdict, which no other figure counts",
    higher_is_better=False,
    rows=_share_of(lambda record: not is_judged(record)),
    value=ratio,
    is_binary=True,
)
