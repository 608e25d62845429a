# SPDX-License-Identifier: Apache-2.0
"""Statistics of sums: slow twins, scipy, the exact test, and figures that are not defined."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from keelwright.core.errors import ConfigError, DataError, NumericalError
from keelwright.ops.bootstrap import cluster_permutation
from keelwright.ops.paired import mcnemar_exact
from keelwright.ops.resampling import Floats, interval_ends
from keelwright.ops.statistic import (
    balanced_accuracy,
    bootstrap_statistic,
    gap,
    harmonic_mean,
    paired_statistic,
    quotient,
    ratio,
    relative_drop,
    swap_test,
)


def _rate(values: Floats) -> Floats:
    return np.stack([values, np.ones_like(values)], axis=1)


def _labels(n: int, share: float, seed: int) -> Floats:
    return (np.random.default_rng(seed).random(n) < share).astype(np.float64)


def test_named_figures_are_their_formulas() -> None:
    sums = np.array([[3.0, 4.0, 1.0, 5.0]])
    assert ratio(sums)[0] == 0.75
    assert gap(sums)[0] == pytest.approx(0.55)
    assert balanced_accuracy(sums)[0] == pytest.approx(0.775)
    assert relative_drop(sums)[0] == pytest.approx(-1 / 3)
    assert harmonic_mean(sums)[0] == pytest.approx(2 * 0.75 * 0.2 / 0.95)
    assert harmonic_mean(np.array([[0.0, 4.0, 0.0, 5.0]]))[0] == 0.0


def test_refusing_everything_and_nothing_have_the_published_contrast() -> None:
    for refused in (0.0, 7.0):
        sums = np.array([[refused, 7.0, refused, 7.0]])
        assert balanced_accuracy(sums)[0] == 0.5
        assert gap(sums)[0] == 0.0


def test_a_quotient_by_zero_is_not_a_number() -> None:
    assert np.isnan(quotient(np.array([1.0]), np.array([0.0]))[0])


@pytest.mark.parametrize("kind", ["labels", "numbers"])
@pytest.mark.parametrize(("interval", "method"), [("percentile", "percentile"), ("bca", "BCa")])
def test_interval_of_a_rate_agrees_with_scipy(kind: str, interval: str, method: str) -> None:
    values = _labels(300, 0.2, 1) if kind == "labels" else np.random.default_rng(2).exponential(size=90)
    ours = bootstrap_statistic(_rate(values), ratio, interval=interval)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method=method, rng=np.random.default_rng(0))
    width = ours.high - ours.low
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.05 * width)
    assert ours.n == len(values)


def test_interval_of_a_gap_agrees_with_a_slow_twin_over_whole_clusters() -> None:
    rng = np.random.default_rng(4)
    columns = np.stack([_labels(240, 0.7, 5), np.ones(240), _labels(240, 0.2, 6), np.ones(240)], axis=1)
    side = rng.random(240) < 0.5
    columns[side, :2] = 0.0
    columns[~side, 2:] = 0.0
    clusters = rng.integers(0, 60, 240).tolist()
    ours = bootstrap_statistic(columns, gap, clusters=clusters, interval="percentile")
    members = [np.flatnonzero(np.array(clusters) == one) for one in range(60)]
    drawn = []
    for _ in range(4000):
        rows = np.concatenate([members[one] for one in rng.integers(0, 60, 60)])
        drawn.append(float(gap(columns[rows].sum(axis=0))))
    low, high = np.quantile(drawn, (0.025, 0.975))
    width = ours.high - ours.low
    assert ours.low == pytest.approx(low, abs=0.06 * width)
    assert ours.high == pytest.approx(high, abs=0.06 * width)


def test_order_of_units_changes_nothing() -> None:
    rng = np.random.default_rng(7)
    values, clusters = rng.exponential(size=120), rng.integers(0, 40, 120)
    order = rng.permutation(120)
    one = bootstrap_statistic(_rate(values), ratio, clusters=clusters.tolist())
    other = bootstrap_statistic(_rate(values[order]), ratio, clusters=clusters[order].tolist())
    assert (one.value, one.low, one.high) == (
        pytest.approx(other.value),
        pytest.approx(other.low),
        pytest.approx(other.high),
    )


def test_units_outside_the_figure_do_not_move_its_value() -> None:
    columns = _rate(_labels(50, 0.3, 8))
    more = np.concatenate([columns, np.zeros((30, 2))])
    assert bootstrap_statistic(more, ratio).value == bootstrap_statistic(columns, ratio).value


def test_crossed_interval_is_wider_than_that_of_either_factor() -> None:
    rng = np.random.default_rng(9)
    rows, others = np.repeat(np.arange(20), 15), np.tile(np.arange(15), 20)
    values = rng.normal(size=20)[rows] + rng.normal(size=15)[others] + 0.1 * rng.normal(size=300)
    by_row = bootstrap_statistic(_rate(values), ratio, clusters=rows.tolist())
    by_other = bootstrap_statistic(_rate(values), ratio, clusters=others.tolist())
    both = bootstrap_statistic(_rate(values), ratio, clusters=rows.tolist(), second_clusters=others.tolist())
    widths = [one.high - one.low for one in (by_row, by_other, both)]
    assert widths[2] > max(widths[:2])
    assert widths[2] == pytest.approx(np.hypot(widths[0], widths[1]), rel=0.15)


def test_crossed_interval_agrees_with_a_slow_twin() -> None:
    rng = np.random.default_rng(10)
    rows, others, values = rng.integers(0, 12, 90), rng.integers(0, 9, 90), rng.exponential(size=90)
    ours = bootstrap_statistic(
        _rate(values), ratio, clusters=rows.tolist(), second_clusters=others.tolist(), interval="percentile"
    )
    drawn = []
    for _ in range(5000):
        weights = np.bincount(rng.integers(0, 12, 12), minlength=12)[rows]
        weights = weights * np.bincount(rng.integers(0, 9, 9), minlength=9)[others]
        drawn.append((weights * values).sum() / weights.sum() if weights.sum() else np.nan)
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    width = ours.high - ours.low
    assert (ours.low, ours.high) == (pytest.approx(low, abs=0.06 * width), pytest.approx(high, abs=0.06 * width))


def test_a_second_factor_without_a_first_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a first"):
        bootstrap_statistic(_rate(np.arange(4.0)), ratio, second_clusters=[0, 0, 1, 1])


def test_paired_change_of_a_rate_is_the_bootstrap_of_the_differences() -> None:
    before, after = _labels(200, 0.3, 11), _labels(200, 0.2, 12)
    ours = paired_statistic(_rate(before), _rate(after), ratio)
    twin = bootstrap_statistic(_rate(after - before), ratio)
    assert ours.value == pytest.approx(twin.value)
    assert ours.low == pytest.approx(twin.low, abs=0.1 * (ours.high - ours.low))
    assert ours.high == pytest.approx(twin.high, abs=0.1 * (ours.high - ours.low))


def test_no_change_has_no_width() -> None:
    columns = _rate(_labels(50, 0.3, 13))
    found = paired_statistic(columns, columns, ratio)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    assert swap_test(columns, columns, ratio) == 1.0


def test_sides_of_other_items_are_refused() -> None:
    with pytest.raises(DataError, match="do not pair up") as caught:
        paired_statistic(np.ones((3, 2)), np.ones((4, 2)), ratio)
    assert caught.value.expected == "shape [3, 2] on both sides"


def test_one_cluster_is_an_error_and_not_a_zero_width_interval() -> None:
    with pytest.raises(DataError, match="more than one cluster"):
        bootstrap_statistic(_rate(np.arange(4.0)), ratio, clusters=["a"] * 4)
    with pytest.raises(DataError, match="more than one cluster"):
        bootstrap_statistic(_rate(np.arange(4.0)), ratio, clusters=[0, 1, 2, 3], second_clusters=["a"] * 4)
    with pytest.raises(DataError, match="more than one item"):
        bootstrap_statistic(_rate(np.ones(1)), ratio)


def test_a_figure_that_is_not_defined_is_refused() -> None:
    with pytest.raises(DataError, match="not defined on these units") as caught:
        bootstrap_statistic(np.zeros((5, 2)), ratio)
    assert caught.value.fix == "report it as not measured; is a denominator empty?"


def test_a_figure_that_rests_on_one_unit_has_no_interval() -> None:
    columns = np.zeros((40, 2))
    columns[0] = 1.0
    with pytest.raises(DataError, match="undefined on too many resamples") as caught:
        bootstrap_statistic(columns, ratio)
    assert caught.value.expected == "at most 10% of them"


def test_what_is_not_a_table_of_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match="one row per unit"):
        bootstrap_statistic(np.ones(3), ratio)
    with pytest.raises(NumericalError, match="holds NaN") as caught:
        bootstrap_statistic([[np.nan, 1.0], [1.0, 1.0]], ratio)
    assert caught.value.found == "1 such rows of 2"


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_swap_test_is_exact_mcnemar_on_labels(alternative: str) -> None:
    for gained, lost in ((12, 3), (10, 2), (25, 10), (0, 5), (60, 41)):
        before = np.concatenate([np.zeros(gained), np.ones(lost), np.ones(20)])
        after = np.concatenate([np.ones(gained), np.zeros(lost), np.ones(20)])
        found = swap_test(_rate(before), _rate(after), ratio, alternative=alternative)
        assert found == pytest.approx(mcnemar_exact(gained, lost, alternative=alternative), rel=1e-9)


def test_swap_test_counts_every_swap_of_few_clusters() -> None:
    rng = np.random.default_rng(14)
    first, second = rng.exponential(size=(8, 4)) + 1.0, rng.exponential(size=(8, 4)) + 1.0
    observed = float(gap(second.sum(axis=0)) - gap(first.sum(axis=0)))
    reached = 0
    for swap in itertools.product((False, True), repeat=8):
        chosen = np.array(swap)[:, None]
        left, right = np.where(chosen, second, first), np.where(chosen, first, second)
        reached += abs(float(gap(right.sum(axis=0)) - gap(left.sum(axis=0)))) >= abs(observed) - 1e-12
    assert swap_test(first, second, gap) == pytest.approx(reached / 256)


def test_swap_test_swaps_whole_clusters() -> None:
    before, after = np.zeros(40), np.ones(40)
    clusters = [place // 10 for place in range(40)]
    assert swap_test(_rate(before), _rate(after), ratio, clusters=clusters) == pytest.approx(2 / 2**4)
    assert swap_test(_rate(before), _rate(after), ratio) == pytest.approx(2 / 2**40)


def test_random_swaps_agree_with_sign_flips_and_never_give_zero() -> None:
    rng = np.random.default_rng(15)
    before = rng.exponential(size=80)
    after = before + rng.normal(0.12, 0.5, size=80)
    found = swap_test(_rate(before), _rate(after), ratio)
    assert found == pytest.approx(cluster_permutation(after - before, range(80)), abs=0.015)
    assert swap_test(_rate(before), _rate(before + 1.0 + 0.1 * after), ratio) == pytest.approx(1 / 10_001)


def test_equal_changes_are_swapped_by_number_with_the_same_chances() -> None:
    rng = np.random.default_rng(16)
    moves = np.repeat(rng.integers(-3, 4, size=20), 20).astype(np.float64)
    before = np.full(400, 5.0)
    found = swap_test(_rate(before), _rate(before + moves), ratio)
    assert found == pytest.approx(cluster_permutation(moves, range(400)), abs=0.02)


def test_interval_of_few_clusters_is_as_wide_as_students() -> None:
    # For normal values the widened percentile interval is about Student's own.
    values = np.random.default_rng(17).normal(size=8)
    found = bootstrap_statistic(_rate(values), ratio, interval="percentile", resamples=50_000)
    half = stats.t.ppf(0.975, 7) * values.std(ddof=1) / np.sqrt(8)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    plain = 2 * 1.96 * values.std() / np.sqrt(8)
    assert found.high - found.low > 1.15 * plain


def test_two_units_have_an_interval_over_all_that_can_be_drawn() -> None:
    found = bootstrap_statistic(np.array([[0.0, 1.0], [1.0, 1.0]]), ratio)
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_a_figure_that_no_group_can_be_left_out_of_has_an_interval_without_acceleration() -> None:
    # Without either group one side of the gap is empty, so leaving one out defines nothing.
    draws = np.linspace(0.0, 1.0, 1001)
    plain = interval_ends(draws, 0.5, np.array([]), interval="bca", confidence=0.95)
    assert plain == pytest.approx((0.025, 0.975), abs=2e-3)
