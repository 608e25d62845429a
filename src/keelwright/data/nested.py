# SPDX-License-Identifier: Apache-2.0
"""Samples of rows that grow: the rows for a smaller count are the first of those for a larger one."""

from __future__ import annotations

import random
from collections.abc import Sequence

from keelwright.core.config import require_in_range
from keelwright.core.errors import DataError
from keelwright.core.seeds import derive_seed
from keelwright.data.rows import ChatRow


def nested_sample(rows: Sequence[ChatRow], k: int, *, seed: int, name: str) -> tuple[ChatRow, ...]:
    """Return `k` different rows in a seeded order, so that a curve over `k` adds rows and exchanges none.

    Args:
        rows: The pool.
        k: How many, 0 to the size of the pool.
        seed: Of the order.
        name: Of the rows: each name has an order of its own, and error texts say it.

    Raises:
        DataError: The pool is too small; rows are not drawn twice.
    """
    require_in_range("k", k, low=0)
    if k > len(rows):
        raise DataError(
            f"There are not enough '{name}' rows.",
            expected=f"at least {k} different rows",
            found=str(len(rows)),
            fix=f"ask for {len(rows)} or fewer, or give more '{name}' rows",
        )
    order = list(range(len(rows)))
    random.Random(derive_seed(seed, "data", "nested", name)).shuffle(order)
    return tuple(rows[index] for index in order[:k])
