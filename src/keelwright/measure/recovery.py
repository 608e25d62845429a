# SPDX-License-Identifier: Apache-2.0
"""How much of a loss was got back: the degradation index of a change, and the share that a repair recovered.

*Equation*: recovered = (tuned - repaired) / (tuned - aligned), with each side's value of one metric. It is not given
where the loss itself is not shown, that is, where the interval of `tuned - aligned` holds 0: a share of nothing would
be any number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from keelwright.core.errors import DataError
from keelwright.core.records import Estimate, Record
from keelwright.measure.change import change_of
from keelwright.measure.metric import Floats, Metric, dependence
from keelwright.ops.statistic import bootstrap_statistic


def recovered_share(
    metric: Metric,
    aligned: Sequence[Record],
    tuned: Sequence[Record],
    repaired: Sequence[Record],
    *,
    seed: int = 0,
) -> Estimate | None:
    """Return the share of the loss that a repair got back, with a bootstrap interval over the items of all three.

    Args:
        metric: What was lost.
        aligned, tuned, repaired: Records of each model on the same items, made under the same conditions.
        seed: Of the bootstrap.

    Returns:
        1 for a full recovery, 0 for none, below 0 for a further loss; None where no loss is shown.
    """
    loss = change_of(metric, aligned, tuned)
    if loss is None or loss.low <= 0.0 <= loss.high:
        return None
    sides = [metric.rows(records) for records in (aligned, tuned, repaired)]
    shared = [unit for unit in sides[0] if unit in sides[1] and unit in sides[2]]
    if len(shared) < 2:
        return None
    tables = [np.array([side[unit].columns for unit in shared], dtype=np.float64) for side in sides]
    rows = np.concatenate(tables, axis=1)
    width = rows.shape[1] // len(sides)

    def share(sums: Floats) -> Floats:
        first, second, third = (metric.value(sums[..., start : start + width]) for start in range(0, 3 * width, width))
        lost = np.asarray(second - first)
        return np.asarray((second - third) / np.where(lost == 0.0, np.nan, lost))

    clusters, seconds = dependence([sides[0][unit] for unit in shared])
    try:
        return bootstrap_statistic(rows, share, clusters=clusters, second_clusters=seconds, seed=seed)
    except DataError:
        return None
