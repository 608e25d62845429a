# SPDX-License-Identifier: Apache-2.0
"""Training seeds as the unit, against SciPy."""

from __future__ import annotations

import pytest
from scipy import stats

from keelwright.core.errors import DataError, NumericalError
from keelwright.ops.training_seeds import seed_test

FIRST, SECOND = (0.21, 0.34, 0.28, 0.19, 0.30), (0.15, 0.22, 0.25, 0.20, 0.18)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_t_agrees_with_scipy(alternative: str) -> None:
    expected = stats.ttest_rel(SECOND, FIRST, alternative=alternative)
    found = seed_test(FIRST, SECOND, alternative=alternative)
    assert found.p_value == pytest.approx(expected.pvalue)
    ends = stats.ttest_rel(SECOND, FIRST).confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == (pytest.approx(ends.low), pytest.approx(ends.high))
    assert found.difference.n == 5


def test_permutation_counts_every_pattern_and_says_what_it_can_reach() -> None:
    found = seed_test((0.3, 0.4, 0.5), (0.1, 0.1, 0.2), test="permutation")
    assert found.p_value == found.smallest_p == 0.25
    assert seed_test((0.3,) * 3, (0.1,) * 3, test="permutation", alternative="less").p_value == 0.125


def test_two_seeds_are_too_few() -> None:
    with pytest.raises(DataError, match="same training seeds") as caught:
        seed_test((0.1, 0.2), (0.2, 0.3))
    assert caught.value.expected == "at least 3 figures each, paired by seed"


def test_equal_differences_have_no_t_but_a_permutation() -> None:
    with pytest.raises(DataError, match="not defined") as caught:
        seed_test((0.5, 0.5, 0.5), (1.0, 1.0, 1.0))
    assert caught.value.fix == "use test='permutation'"
    assert seed_test((0.5, 0.2, 0.1), (0.5, 0.2, 0.1)).p_value == 1.0


def test_a_failed_seed_is_refused() -> None:
    with pytest.raises(NumericalError, match="NaN or infinite"):
        seed_test((0.1, float("nan"), 0.2), (0.1, 0.1, 0.2))
