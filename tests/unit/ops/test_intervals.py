# SPDX-License-Identifier: Apache-2.0
"""Intervals of one proportion against published values and against SciPy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
from scipy import stats

from keelwright.core.errors import ConfigError
from keelwright.core.records import Estimate
from keelwright.ops.intervals import (
    binomial_at_least,
    clopper_pearson,
    normal_quantile,
    student_cdf,
    student_quantile,
    wilson,
    zero_events_upper,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(5, 100, 0.0215, 0.1118), (0, 100, 0.0, 0.0370), (20, 313, 0.0417, 0.0966), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_gives_the_published_values(successes: int, n: int, low: float, high: float) -> None:
    estimate = wilson(successes, n)
    assert estimate.value == successes / n
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (low, high)
    assert estimate.n == n


@pytest.mark.parametrize("n", [1, 2, 10, 313, 100_000])
def test_both_intervals_agree_with_scipy(n: int) -> None:
    for successes in {0, 1, n // 3, n // 2, n - 1, n}:
        oracle = stats.binomtest(successes, n)
        for ours, method in ((wilson, "wilson"), (clopper_pearson, "exact")):
            expected = oracle.proportion_ci(0.9, method=method)
            found = ours(successes, n, confidence=0.9)
            assert found.low == pytest.approx(expected.low, abs=1e-12)
            assert found.high == pytest.approx(expected.high, abs=1e-12)


def test_intervals_end_exactly_at_zero_and_one() -> None:
    for interval in (wilson, clopper_pearson):
        assert interval(0, 7).low == 0.0
        assert interval(7, 7).high == 1.0


@functools.cache
def _ends(interval: Callable[[int, int], Estimate], n: int) -> list[tuple[float, float]]:
    return [(found.low, found.high) for found in (interval(k, n) for k in range(n + 1))]


@pytest.mark.parametrize(
    ("p", "of_wilson", "of_exact"), [(0.02, 0.949, 0.985), (0.1, 0.936, 0.956), (0.5, 0.943, 0.965)]
)
def test_coverage_by_enumeration_is_as_published(p: float, of_wilson: float, of_exact: float) -> None:
    n = 100
    chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    for interval, expected in ((wilson, of_wilson), (clopper_pearson, of_exact)):
        covered = [low <= p <= high for low, high in _ends(interval, n)]
        assert sum(chance for chance, inside in zip(chances, covered, strict=True) if inside) == pytest.approx(
            expected, abs=5e-4
        )


def test_zero_events_leave_about_three_over_n() -> None:
    assert zero_events_upper(300) == pytest.approx(1 - 0.05 ** (1 / 300), rel=1e-12)
    assert zero_events_upper(300) == pytest.approx(3 / 300, rel=0.01)


def test_binomial_tail_agrees_with_exact_sums() -> None:
    for k in range(-1, 13):
        expected = sum(math.comb(11, i) * 0.3**i * 0.7 ** (11 - i) for i in range(max(k, 0), 12))
        assert binomial_at_least(k, 11, 0.3) == pytest.approx(expected, abs=1e-14)
    assert binomial_at_least(3, 11, 0.0) == 0.0
    assert binomial_at_least(3, 11, 1.0) == 1.0


def test_normal_quantile_is_the_textbook_one() -> None:
    assert normal_quantile(0.975) == pytest.approx(1.959964, abs=1e-6)


def test_student_distribution_agrees_with_scipy() -> None:
    for freedom in (1, 2, 4, 30):
        for t in (-3.0, -0.5, 0.0, 1.2, 12.0):
            assert student_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-12)
        assert student_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom))


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_impossible_counts_are_refused(successes: int, n: int) -> None:
    for interval in (wilson, clopper_pearson):
        with pytest.raises(ConfigError, match="at least one item") as caught:
            interval(successes, n)
        assert caught.value.found == f"successes={successes}, n={n}"
        assert caught.value.expected == "n >= 1 and 0 <= successes <= n"


def test_a_confidence_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="'confidence' is out of range"):
        wilson(1, 2, confidence=1.0)
