# SPDX-License-Identifier: Apache-2.0
"""The signed-rank test against SciPy and against every pattern of signs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from keelwright.core.errors import DataError, NumericalError
from keelwright.ops.ranks import midranks, signed_ranks

ALTERNATIVES = ("two-sided", "greater", "less")


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("n", [1, 5, 12, 50])
def test_exact_value_agrees_with_scipy(n: int, alternative: str) -> None:
    change = np.random.default_rng(n).normal(0.3, 1.0, size=n)
    found = signed_ranks(np.zeros(n), change, alternative=alternative)
    assert found.exact
    assert found.p_value == pytest.approx(stats.wilcoxon(change, alternative=alternative, mode="exact").pvalue)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_value_of_many_marks_with_zeros_and_ties_agrees_with_scipy(alternative: str) -> None:
    rng = np.random.default_rng(3)
    before = rng.integers(1, 6, size=400)
    after = np.clip(before + rng.integers(-1, 3, size=400), 1, 5)
    found = signed_ranks(before, after, alternative=alternative)
    theirs = stats.wilcoxon(
        after - before, zero_method="pratt", correction=True, alternative=alternative, method="asymptotic"
    )
    assert not found.exact
    assert found.zeros == int((before == after).sum()) > 0
    assert found.p_value == pytest.approx(theirs.pvalue, rel=1e-6)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_few_marks_with_zeros_and_ties_are_counted_over_all_signs(alternative: str) -> None:
    change = np.array([0.0, 0.0, 1.0, 1.0, -1.0, 2.0, 3.0, -2.0, 1.0, 0.0, 4.0])
    ranks = stats.rankdata(np.abs(change))[change != 0]
    observed = ranks[change[change != 0] > 0].sum()
    sums = np.array([(ranks * np.array(signs)).sum() for signs in itertools.product((0, 1), repeat=len(ranks))])
    rising, falling = (sums >= observed - 1e-9).mean(), (sums <= observed + 1e-9).mean()
    expected = {"greater": rising, "less": falling, "two-sided": min(1.0, 2 * min(rising, falling))}
    found = signed_ranks(np.zeros(11), change, alternative=alternative)
    assert found.p_value == pytest.approx(expected[alternative])
    assert found.above == observed
    assert found.above + found.below == ranks.sum()


def test_approximation_joins_the_exact_value() -> None:
    rng = np.random.default_rng(6)
    for n in (100, 101):
        change = rng.normal(0.15, 1.0, size=n)
        theirs = stats.wilcoxon(change, correction=True, method="asymptotic").pvalue
        assert signed_ranks(np.zeros(n), change).p_value == pytest.approx(theirs, abs=0.003)


def test_no_change_is_no_evidence() -> None:
    found = signed_ranks([3, 4, 5], [3, 4, 5])
    assert (found.p_value, found.zeros, found.n) == (1.0, 3, 3)


def test_midranks_agree_with_scipy() -> None:
    values = np.random.default_rng(1).integers(0, 6, size=40).astype(np.float64)
    assert midranks(values).tolist() == stats.rankdata(values).tolist()


def test_marks_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(DataError, match="do not pair up") as caught:
        signed_ranks([1, 2], [1])
    assert caught.value.found == "2 before, 1 after"
    with pytest.raises(NumericalError, match="NaN or infinite"):
        signed_ranks([1.0, float("nan")], [1.0, 2.0])
