# SPDX-License-Identifier: Apache-2.0
"""Two shares on different items, against SciPy."""

from __future__ import annotations

import itertools

import pytest
from scipy import stats

from keelwright.core.errors import ConfigError
from keelwright.ops.unpaired import fisher_exact, two_proportion_test, unpaired_difference

ALTERNATIVES = ("two-sided", "greater", "less")


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_fisher_agrees_with_scipy(alternative: str) -> None:
    # SciPy's first share is the one of the first row; ours asks about the second.
    theirs = {"two-sided": "two-sided", "greater": "less", "less": "greater"}[alternative]
    for a, b, c, d in itertools.product((0, 2, 7), (1, 5, 30), (0, 3, 20), (2, 9)):
        expected = stats.fisher_exact([[a, b], [c, d]], alternative=theirs).pvalue
        assert fisher_exact(a, b, c, d, alternative=alternative) == pytest.approx(expected, rel=1e-9)


def test_fisher_holds_for_large_tables() -> None:
    expected = stats.fisher_exact([[400, 1600], [450, 1550]]).pvalue
    assert fisher_exact(400, 1600, 450, 1550) == pytest.approx(expected, rel=1e-7)


def test_fisher_of_the_lady_tasting_tea_is_the_textbook_value() -> None:
    # Fisher, The Design of Experiments, chapter II: three of four cups right, 17 of 70.
    assert fisher_exact(1, 3, 3, 1, alternative="greater") == pytest.approx(17 / 70)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_normal_test_is_the_chi_squared_test_of_scipy(alternative: str) -> None:
    p_value = two_proportion_test(20, 200, 41, 250, alternative=alternative)
    chi = stats.chi2_contingency([[20, 180], [41, 209]], correction=False).pvalue
    expected = {"two-sided": chi, "greater": chi / 2, "less": 1 - chi / 2}[alternative]
    assert p_value == pytest.approx(expected)


def test_shares_without_spread_do_not_differ() -> None:
    assert two_proportion_test(0, 5, 0, 9) == 1.0


def test_newcombe_interval_gives_the_published_value() -> None:
    # Newcombe 1998, Statistics in Medicine 17, 873-890, Table II, method 10: 56/70 - 48/80.
    found = unpaired_difference(48, 80, 56, 70)
    assert found.value == pytest.approx(0.2)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0524, 0.3339)
    assert found.n == 150


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="negative"):
        fisher_exact(-1, 2, 3, 4)
    with pytest.raises(ConfigError, match="at least one item"):
        two_proportion_test(3, 2, 1, 5)
