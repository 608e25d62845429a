# SPDX-License-Identifier: Apache-2.0
"""Paired tests, intervals, multiplicity and sample sizes against published values and SciPy."""

from __future__ import annotations

import itertools
import math

import pytest
from scipy import stats

from keelwright.core.errors import ConfigError
from keelwright.ops.paired import (
    benjamini_hochberg,
    holm,
    mcnemar_exact,
    minimum_detectable_change,
    non_inferiority,
    paired_difference,
    required_pairs,
    required_per_arm,
)
from keelwright.ops.power import mcnemar_power


@pytest.mark.parametrize(
    ("b", "c", "p_value"),
    [(12, 3, 0.03516), (10, 2, 0.03857), (6, 0, 0.03125), (5, 0, 0.0625), (25, 10, 0.01667), (0, 0, 1.0)],
)
def test_mcnemar_gives_the_published_values_both_ways_round(b: int, c: int, p_value: float) -> None:
    assert round(mcnemar_exact(b, c), 5) == p_value
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b)


def test_mid_p_gives_the_published_value() -> None:
    assert round(mcnemar_exact(12, 3, mid_p=True), 5) == 0.02127
    assert mcnemar_exact(0, 0, mid_p=True) == 1.0
    assert mcnemar_exact(4, 4, mid_p=True) == 1.0


def test_mcnemar_agrees_with_the_binomial_test_of_scipy() -> None:
    for b, c in itertools.product((0, 1, 4, 9, 40), repeat=2):
        if b + c == 0:
            continue
        for alternative in ("two-sided", "greater", "less"):
            expected = stats.binomtest(b, b + c, alternative=alternative).pvalue
            assert mcnemar_exact(b, c, alternative=alternative) == pytest.approx(expected, rel=1e-12)


def test_one_sided_mcnemar_asks_for_gains() -> None:
    assert mcnemar_exact(8, 1, alternative="greater") < 0.05 < mcnemar_exact(8, 1, alternative="less")


def test_mcnemar_is_exact_where_floats_would_underflow() -> None:
    assert mcnemar_exact(3000, 3000) == 1.0
    assert mcnemar_exact(900, 100) == pytest.approx(2 * stats.binom.cdf(100, 1000, 0.5), rel=1e-9)


@pytest.mark.parametrize(("b", "c"), [(-1, 2), (2, -1)])
def test_negative_counts_are_refused(b: int, c: int) -> None:
    with pytest.raises(ConfigError, match="impossible"):
        mcnemar_exact(b, c)


def test_tango_interval_inverts_the_score_test() -> None:
    n, b, c = 100, 12, 4
    z = stats.norm.ppf(0.975)
    estimate = paired_difference(b, c, n)
    assert estimate.value == pytest.approx(0.08)
    for end in (estimate.low, estimate.high):
        # The constrained maximum of the likelihood, found numerically instead of by the quadratic.
        losing = max(
            (i / 200_000 for i in range(1, 200_000) if i / 200_000 + end > 0 and 2 * i / 200_000 + end < 1),
            key=lambda q, end=end: b * math.log(q + end) + c * math.log(q) + (n - b - c) * math.log(1 - 2 * q - end),
        )
        score = (b - c - n * end) / math.sqrt(n * (2 * losing + end * (1 - end)))
        assert abs(score) == pytest.approx(z, abs=1e-4)


def test_interval_of_no_change_has_width() -> None:
    estimate = paired_difference(0, 0, 100)
    half = 1.959964**2 / (100 + 1.959964**2)
    assert estimate.value == 0.0
    assert (estimate.low, estimate.high) == (pytest.approx(-half, abs=1e-6), pytest.approx(half, abs=1e-6))


def test_interval_mirrors_when_gains_and_losses_swap() -> None:
    one, other = paired_difference(17, 5, 60), paired_difference(5, 17, 60)
    assert (one.low, one.high) == (pytest.approx(-other.high), pytest.approx(-other.low))


def test_interval_of_a_complete_change_ends_at_one() -> None:
    assert paired_difference(30, 0, 30).high == 1.0
    assert paired_difference(0, 30, 30).low == -1.0


def test_more_changed_pairs_than_pairs_are_refused() -> None:
    with pytest.raises(ConfigError, match="impossible") as caught:
        paired_difference(3, 3, 5)
    assert caught.value.found == "b=3, c=3, n=5"


def test_holm_and_benjamini_hochberg_give_the_published_values() -> None:
    p_values = (0.001, 0.012, 0.03, 0.04)
    assert holm(p_values) == pytest.approx([0.004, 0.036, 0.06, 0.06])
    assert benjamini_hochberg(p_values) == pytest.approx([0.004, 0.024, 0.04, 0.04])


def test_adjustments_keep_the_order_of_the_input() -> None:
    assert holm((0.04, 0.001, 0.03, 0.012)) == pytest.approx([0.06, 0.004, 0.06, 0.036])
    assert benjamini_hochberg((0.04, 0.001, 0.03, 0.012)) == pytest.approx([0.04, 0.004, 0.04, 0.024])
    assert holm(()) == [] == benjamini_hochberg(())


def test_benjamini_hochberg_agrees_with_scipy() -> None:
    p_values = (0.2, 0.01, 0.9, 0.04, 0.04, 0.6)
    assert benjamini_hochberg(p_values) == pytest.approx(list(stats.false_discovery_control(p_values)))


@pytest.mark.parametrize(
    ("discordant", "change", "pairs"), [(0.10, 0.05, 312), (0.20, 0.05, 626), (0.20, 0.10, 155), (0.30, 0.10, 234)]
)
def test_required_pairs_are_the_published_ones(discordant: float, change: float, pairs: int) -> None:
    assert required_pairs(discordant, change) == pairs


@pytest.mark.parametrize(("before", "after", "items"), [(0.05, 0.10, 435), (0.05, 0.15, 141), (0.20, 0.30, 294)])
def test_required_items_per_arm_are_the_published_ones(before: float, after: float, items: int) -> None:
    assert required_per_arm(before, after) == items


def test_detectable_change_has_the_wanted_power_in_the_exact_test() -> None:
    for n, discordant, two_sided in ((312, 0.1, True), (100, 0.3, False), (1000, 0.05, True)):
        change = minimum_detectable_change(n, discordant, two_sided=two_sided)
        assert change < discordant
        assert mcnemar_power(n, discordant, change, two_sided=two_sided) == pytest.approx(0.8, abs=1e-3)
        # The normal formula would promise it from a few pairs fewer.
        assert 0.9 * n < required_pairs(discordant, change, two_sided=two_sided) < n


def test_detectable_change_of_very_many_pairs_follows_the_normal_formula() -> None:
    counted, formula = minimum_detectable_change(190_000, 0.1), minimum_detectable_change(210_000, 0.1)
    assert counted * math.sqrt(190 / 210) == pytest.approx(formula, rel=0.005)


def test_clusters_count_for_fewer_pairs() -> None:
    assert minimum_detectable_change(900, 0.2, design_effect=3.0) == minimum_detectable_change(300, 0.2)
    assert minimum_detectable_change(900, 0.2, design_effect=0.5) == minimum_detectable_change(900, 0.2)


def test_detectable_change_stays_defined_without_discordant_pairs() -> None:
    change = minimum_detectable_change(200, 0.0)
    # All one way, six changed pairs are the fewest that two-sided McNemar rejects.
    assert stats.binom.sf(5, 200, change) == pytest.approx(0.8, abs=1e-3)
    assert minimum_detectable_change(400, 0.0) < change
    assert minimum_detectable_change(200, 0.0, two_sided=False) < change


def test_non_inferiority_holds_only_with_the_limit_inside_the_margin() -> None:
    shown = non_inferiority(10, 12, 1000, margin=0.02)
    assert shown.holds
    assert shown.limit == shown.difference.high < 0.02
    assert shown.p_value < 0.05
    few = non_inferiority(1, 1, 60, margin=0.02)
    assert not few.holds
    assert few.p_value > 0.05


def test_non_inferiority_of_a_rate_that_should_not_fall_mirrors() -> None:
    harm, accuracy = non_inferiority(10, 12, 1000, margin=0.02), non_inferiority(12, 10, 1000, margin=-0.02)
    assert accuracy.holds
    assert accuracy.limit == pytest.approx(-harm.limit)
    assert accuracy.p_value == pytest.approx(harm.p_value)


def test_limit_of_non_inferiority_is_where_its_test_turns() -> None:
    limit = non_inferiority(10, 12, 300, margin=0.5).limit
    assert non_inferiority(10, 12, 300, margin=limit).p_value == pytest.approx(0.05, abs=1e-6)


def test_a_margin_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="the size of the margin"):
        non_inferiority(1, 1, 10, margin=0.0)


def test_too_few_pairs_detect_nothing_for_sure() -> None:
    assert minimum_detectable_change(2, 0.5) == 1.0


def test_a_change_above_the_discordant_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="'discordant_share' is out of range"):
        required_pairs(0.05, 0.1)
