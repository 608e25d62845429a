# SPDX-License-Identifier: Apache-2.0
"""Scores against the truth: tables by hand, calibrated and overconfident judges."""

from __future__ import annotations

import numpy as np
import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.ops.calibration import brier_score, expected_calibration_error, reliability_table
from keelwright.ops.intervals import wilson


def test_table_of_equal_widths_by_hand() -> None:
    table = reliability_table([0.1, 0.2, 0.6, 1.0], [False, True, True, True], bins=2)
    assert [(one.low, one.high, one.share.n) for one in table] == [(0.0, 0.5, 2), (0.5, 1.0, 2)]
    assert [one.mean_score for one in table] == pytest.approx([0.15, 0.8])
    assert table[0].share == wilson(1, 2)
    assert expected_calibration_error(table) == pytest.approx(0.5 * 0.35 + 0.5 * 0.2)


def test_empty_bins_are_left_out() -> None:
    table = reliability_table([0.05, 0.95], [False, True], bins=10)
    assert [round(one.low, 6) for one in table] == [0.0, 0.9]


def test_equal_counts_keep_equal_scores_together() -> None:
    table = reliability_table([0.2] * 5 + [0.4, 0.6, 0.8], [False] * 8, bins=4, binning="count")
    assert sum(one.share.n for one in table) == 8
    assert table[0].share.n == 5
    assert [one.high for one in table] == sorted({one.high for one in table})


def test_equal_counts_of_different_scores_are_equal() -> None:
    table = reliability_table(np.linspace(0.0, 1.0, 40), [False] * 40, bins=8, binning="count")
    assert [one.share.n for one in table] == [5] * 8


def test_a_calibrated_judge_fits_and_an_overconfident_one_does_not() -> None:
    rng = np.random.default_rng(1)
    chances = rng.random(20_000)
    truth = (rng.random(20_000) < chances).tolist()
    good = reliability_table(chances, truth)
    bad = reliability_table(np.where(chances > 0.5, 0.99, 0.01), truth)
    assert expected_calibration_error(good) < 0.02
    assert sum(one.fits for one in good) >= 8
    assert expected_calibration_error(bad) == pytest.approx(0.24, abs=0.02)
    assert not any(one.fits for one in bad)


def test_brier_score_of_plain_cases() -> None:
    assert brier_score([1.0, 0.0], [True, False]) == 0.0
    assert brier_score([0.5, 0.5], [True, False]) == 0.25
    assert brier_score([0.0, 1.0], [True, False]) == 1.0


def test_scores_that_are_no_probabilities_are_refused() -> None:
    with pytest.raises(DataError, match="no probability") as caught:
        brier_score([0.5, 3.0, float("nan")], [True, True, False])
    assert caught.value.found == "2 of 3 outside"
    with pytest.raises(DataError, match="do not pair up"):
        brier_score([0.5], [])
    with pytest.raises(ConfigError, match="'bins' is out of range"):
        reliability_table([0.5], [True], bins=0)
    with pytest.raises(DataError, match="without bins"):
        expected_calibration_error([])
