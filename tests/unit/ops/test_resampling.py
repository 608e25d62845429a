# SPDX-License-Identifier: Apache-2.0
"""Resampled sums: both fast ways against index gathers and against each other."""

from __future__ import annotations

import numpy as np
import pytest

from keelwright.core.errors import ConfigError
from keelwright.ops.resampling import (
    codes_of,
    distinct_rows,
    drawn_counts,
    multinomial_sums,
    require_settings,
    resampled_sums,
    sums_by,
    worth_counting,
)


def _stream() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(5))


def test_counts_times_rows_are_the_gathered_sums() -> None:
    rows = np.sort(np.random.default_rng(1).random((30, 1)), axis=0)
    drawn = _stream().integers(0, 30, size=(7, 30), dtype=np.int32)
    assert resampled_sums(rows, 7, _stream())[:, 0] == pytest.approx(rows[drawn, 0].sum(axis=1))


def test_drawn_counts_add_up() -> None:
    counts = drawn_counts(9, 50, _stream())
    assert counts.shape == (50, 9)
    assert (counts.sum(axis=1) == 9).all()


def test_counts_of_distinct_rows_have_the_moments_of_single_draws() -> None:
    groups = np.repeat([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]], [40, 50, 10], axis=0)
    rows, counts = distinct_rows(groups)
    assert counts.tolist() == [50, 40, 10]
    sums = multinomial_sums(rows, counts, 20_000, _stream())
    assert sums.mean(axis=0) == pytest.approx(groups.sum(axis=0), rel=0.005)
    expected = len(groups) * np.cov(groups.T, bias=True)
    assert np.cov(sums.T) == pytest.approx(expected, rel=0.04)


def test_distinct_rows_do_not_depend_on_order() -> None:
    groups = np.random.default_rng(2).integers(0, 3, size=(50, 3)).astype(np.float64)
    rows, counts = distinct_rows(groups)
    expected, expected_counts = np.unique(groups, axis=0, return_counts=True)
    assert (rows == expected).all()
    assert (counts == expected_counts).all()
    assert (distinct_rows(groups[::-1])[0] == rows).all()


def test_labels_are_worth_counting_and_different_numbers_are_not() -> None:
    assert worth_counting(2, 100)
    assert not worth_counting(100, 100)


def test_sums_by_cluster() -> None:
    codes = codes_of(["b", "a", "b"], 3)
    assert codes.tolist() == [0, 1, 0]
    assert sums_by(codes, np.array([[1.0, 1.0], [2.0, 1.0], [4.0, 1.0]])).tolist() == [[5.0, 2.0], [2.0, 1.0]]


def test_a_missing_cluster_id_is_refused() -> None:
    with pytest.raises(ConfigError, match="one cluster id"):
        codes_of(["a"], 2)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="'interval' is not a known choice"):
        require_settings("normal", 1000, 0.95)
    with pytest.raises(ConfigError, match="'resamples' is out of range"):
        require_settings("bca", 10, 0.95)
    with pytest.raises(ConfigError, match="'confidence' is out of range"):
        require_settings("bca", 1000, 1.0)
