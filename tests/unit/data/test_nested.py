# SPDX-License-Identifier: Apache-2.0
"""Samples that grow."""

from __future__ import annotations

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.nested import nested_sample
from keelwright.data.rows import ChatRow

POOL = [ChatRow(f"question {index}", f"answer {index}") for index in range(20)]


def test_a_smaller_sample_is_the_beginning_of_a_larger_one() -> None:
    largest = nested_sample(POOL, 20, seed=3, name="safety")
    assert all(nested_sample(POOL, k, seed=3, name="safety") == largest[:k] for k in range(21))


def test_no_row_is_drawn_twice() -> None:
    assert sorted(nested_sample(POOL, 20, seed=0, name="safety"), key=POOL.index) == POOL


def test_the_sample_depends_on_the_seed_and_on_the_name() -> None:
    first = nested_sample(POOL, 10, seed=0, name="safety")
    assert first == nested_sample(POOL, 10, seed=0, name="safety")
    assert first != nested_sample(POOL, 10, seed=1, name="safety")
    assert first != nested_sample(POOL, 10, seed=0, name="ordinary")


def test_a_pool_that_is_too_small_is_an_error() -> None:
    with pytest.raises(
        DataError, match=r"not enough 'safety' rows.\n  expected: at least 21 different rows\n  found:    20"
    ):
        nested_sample(POOL, 21, seed=0, name="safety")


def test_a_negative_count_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'k' is out of range"):
        nested_sample(POOL, -1, seed=0, name="safety")
