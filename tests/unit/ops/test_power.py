# SPDX-License-Identifier: Apache-2.0
"""Power of the exact McNemar test, against a sum over every table."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from keelwright.core.errors import ConfigError
from keelwright.ops.paired import mcnemar_exact, required_pairs
from keelwright.ops.power import binomial_tails, mcnemar_power


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize(
    ("n", "discordant", "change"), [(30, 0.5, 0.2), (40, 1.0, 0.3), (50, 0.1, 0.1), (45, 0.2, 0.0)]
)
def test_power_is_the_sum_over_every_table(n: int, discordant: float, change: float, two_sided: bool) -> None:
    expected, share = 0.0, (1 + change / discordant) / 2
    for m in range(n + 1):
        for gained in range(m + 1):
            sided = "two-sided" if two_sided else "greater"
            if mcnemar_exact(gained, m - gained, alternative=sided) <= 0.05:
                expected += stats.binom.pmf(m, n, discordant) * stats.binom.pmf(gained, m, share)
    assert mcnemar_power(n, discordant, change, two_sided=two_sided) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    ("discordant", "change", "power"), [(0.10, 0.05, 0.77), (0.20, 0.05, 0.78), (0.30, 0.10, 0.77)]
)
def test_published_sample_sizes_give_the_exact_test_a_little_less_than_promised(
    discordant: float, change: float, power: float
) -> None:
    found = mcnemar_power(required_pairs(discordant, change), discordant, change)
    assert power - 0.01 < found < 0.8


def test_level_of_the_exact_test_is_held_and_not_used_up() -> None:
    for n, discordant in ((20, 0.1), (100, 0.1), (1000, 0.2), (10_000, 0.3)):
        for two_sided in (True, False):
            assert mcnemar_power(n, discordant, 0.0, two_sided=two_sided) <= 0.05
    assert mcnemar_power(10_000, 0.3, 0.0) > 0.045


def test_tails_agree_with_scipy() -> None:
    n = np.repeat([1, 5, 40, 900], 4)
    k = np.array([0, 1, 2, 1, 0, 3, 5, 6, 10, 20, 30, 41, 400, 450, 520, 900])
    for p in (0.0, 0.2, 0.5, 0.93, 1.0):
        assert binomial_tails(k, n, p) == pytest.approx(stats.binom.sf(k - 1, n, p), abs=1e-12)


def test_without_discordant_pairs_nothing_shows() -> None:
    assert mcnemar_power(100, 0.0, 0.0) == 0.0


def test_a_change_above_the_discordant_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="'change' is out of range"):
        mcnemar_power(100, 0.1, 0.2)
