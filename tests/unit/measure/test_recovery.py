# SPDX-License-Identifier: Apache-2.0
"""The share of a loss that a repair got back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from keelwright.core.records import Record
from keelwright.measure.metric_table import find_metric
from keelwright.measure.recovery import recovered_share

MakeRecord = Callable[..., Record]
METRIC = find_metric("refusal_rate")


@pytest.fixture
def audit_of(record: MakeRecord) -> Callable[[int], list[Record]]:
    """Make an audit of 200 harmful items of which the first few were answered."""

    def make(answered: int) -> list[Record]:
        return [record(f"h{i}", "comply_unhelpful" if i < answered else "refusal_full") for i in range(200)]

    return make


@pytest.mark.parametrize(("left", "share"), [(4, 1.0), (104, 0.0), (54, 0.5), (154, -0.5)])
def test_the_share_is_of_the_loss(audit_of: Callable[[int], list[Record]], left: int, share: float) -> None:
    found = recovered_share(METRIC, audit_of(4), audit_of(104), audit_of(left))
    assert found is not None
    assert found.value == pytest.approx(share)
    assert found.low <= share <= found.high
    assert found.n == 200


def test_a_share_of_a_loss_that_is_not_shown_is_not_given(audit_of: Callable[[int], list[Record]]) -> None:
    assert recovered_share(METRIC, audit_of(4), audit_of(6), audit_of(4)) is None
    assert recovered_share(METRIC, audit_of(4), audit_of(4), audit_of(4)) is None
