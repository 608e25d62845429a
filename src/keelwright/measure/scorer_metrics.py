# SPDX-License-Identifier: Apache-2.0
"""The mean of one judge's scores: for logs of other programs, whose scorers bring their own scale.

Named `score:NAME` where more is better and `cost:NAME` where less is. An item that was answered several times counts
once, by the mean of its scores.
"""

from __future__ import annotations

from collections.abc import Sequence

from keelwright.core.records import Record
from keelwright.measure.metric import Metric, Row, item_rows, share


def mean_score(judge: str, *, higher_is_better: bool = True) -> Metric:
    """Return the metric of one judge's scores.

    Args:
        judge: Id of the judge in the records.
        higher_is_better: What the score means.
    """

    def contribution(record: Record) -> tuple[float, ...] | None:
        opinion = record.judgements.get(judge)
        return None if opinion is None or opinion.score is None else (opinion.score, 1.0)

    def rows(records: Sequence[Record]) -> dict[str, Row]:
        return item_rows(records, contribution)

    return Metric(
        name=f"{'score' if higher_is_better else 'cost'}:{judge}",
        title=f"Mean of {judge}",
        counts=f"mean score given by {judge}",
        higher_is_better=higher_is_better,
        rows=rows,
        value=share,
        unit="score",
        is_binary=True,
    )
