# SPDX-License-Identifier: Apache-2.0
"""Bootstraps: fixed draws, clusters, and the cases in which there is nothing to resample."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from scipy import stats

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Estimate
from keelwright.ops.bootstrap import (
    bootstrap_mean,
    bootstrap_ratio,
    cluster_permutation,
    design_effect,
    exp_estimate,
    paired_bootstrap,
)


def _skewed(n: int) -> list[float]:
    return [float(value) for value in np.random.default_rng(3).exponential(size=n)]


@pytest.mark.parametrize(("interval", "method"), [("percentile", "percentile"), ("bca", "BCa")])
def test_interval_agrees_with_scipy(interval: str, method: str) -> None:
    values = _skewed(80)
    ours = bootstrap_mean(values, interval=interval)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method=method, rng=np.random.default_rng(0))
    width = ours.high - ours.low
    assert ours.value == pytest.approx(np.mean(values))
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.04 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.04 * width)


def test_the_same_seed_gives_the_same_interval_and_another_does_not() -> None:
    values = _skewed(30)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values) != bootstrap_mean(values, seed=1)


def test_paired_bootstrap_is_the_bootstrap_of_the_differences() -> None:
    before, after = [0.0, 1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0, 1.0]
    assert paired_bootstrap(before, after) == bootstrap_mean([1.0, 0.0, 0.0, -1.0, 0.0])


def test_pairs_of_unequal_length_are_refused() -> None:
    with pytest.raises(DataError, match="do not pair up"):
        paired_bootstrap([0.0, 1.0], [1.0])


def test_one_cluster_is_an_error_and_not_a_zero_width_interval() -> None:
    with pytest.raises(DataError, match="more than one cluster") as caught:
        bootstrap_mean([0.0, 1.0, 1.0], clusters=["a", "a", "a"])
    assert caught.value.found == "1"
    with pytest.raises(DataError, match="more than one item"):
        bootstrap_mean([1.0])


def test_singleton_clusters_change_nothing() -> None:
    values = _skewed(25)
    assert bootstrap_mean(values, clusters=list(range(25))) == bootstrap_mean(values)


def test_repeating_every_item_widens_the_interval_only_by_cluster() -> None:
    values = _skewed(40)
    repeated = [value for value in values for _ in range(4)]
    clusters = [index for index in range(40) for _ in range(4)]
    alone, by_item = bootstrap_mean(values), bootstrap_mean(repeated)
    by_cluster = bootstrap_mean(repeated, clusters=clusters)
    assert by_cluster.high - by_cluster.low == pytest.approx(alone.high - alone.low, rel=1e-9)
    assert by_item.high - by_item.low < 0.6 * (alone.high - alone.low)


def test_a_missing_cluster_id_is_refused() -> None:
    with pytest.raises(ConfigError, match="one cluster id"):
        bootstrap_mean([0.0, 1.0, 2.0], clusters=["a", "b"])


def test_ratio_weights_groups_by_their_size() -> None:
    estimate = bootstrap_ratio([2.0, 30.0, 1.0], [1.0, 10.0, 1.0])
    assert estimate.value == pytest.approx(33 / 12)
    assert estimate.low <= estimate.value <= estimate.high
    assert estimate.n == 3


def test_constant_values_have_a_point_interval() -> None:
    assert bootstrap_mean([0.5] * 9) == Estimate(0.5, 0.5, 0.5, 9)


def test_sign_flips_are_exact_for_few_clusters() -> None:
    differences, clusters = [1.0, 1.0, 0.0, 1.0, -1.0, 1.0], ["a", "a", "b", "c", "d", "e"]
    sums = [2.0, 0.0, 1.0, -1.0, 1.0]
    totals = [sum(s * v for s, v in zip(signs, sums, strict=True)) for signs in itertools.product((1, -1), repeat=5)]
    expected = sum(abs(total) >= 3.0 for total in totals) / len(totals)
    assert cluster_permutation(differences, clusters) == pytest.approx(expected)
    assert cluster_permutation(differences, clusters, alternative="greater") == pytest.approx(
        sum(total >= 3.0 for total in totals) / len(totals)
    )


def test_random_sign_flips_find_a_change_and_never_give_zero() -> None:
    clusters = list(range(60))
    assert cluster_permutation([1.0] * 60, clusters) == pytest.approx(1 / 10_001)
    assert cluster_permutation([1.0, -1.0] * 30, clusters) == pytest.approx(1.0)
    assert cluster_permutation([1.0] * 60, clusters, alternative="less") == pytest.approx(1.0)


def test_design_effect_is_the_cluster_size_for_identical_members() -> None:
    values = _skewed(200)
    repeated = [value for value in values for _ in range(3)]
    clusters = [index for index in range(200) for _ in range(3)]
    assert design_effect(repeated, clusters) == pytest.approx(3.0, rel=0.02)
    assert design_effect(values, list(range(200))) == pytest.approx(1.0)


def test_design_effect_of_constant_values_is_refused() -> None:
    with pytest.raises(DataError, match="not vary"):
        design_effect([1.0, 1.0], ["a", "b"])


def test_exponential_of_an_estimate_keeps_order_and_count() -> None:
    found = exp_estimate(Estimate(0.0, -0.1, 0.2, 7))
    assert (found.value, found.low, found.high, found.n) == (1.0, math.exp(-0.1), math.exp(0.2), 7)


def test_ten_thousand_items_by_ten_thousand_resamples_need_little_memory_and_time() -> None:
    values = np.random.default_rng(0).random(10_000)
    start = time.process_time()
    bootstrap_mean(values)
    # A Python loop over resamples would take minutes; the bound only tells loops from blocks.
    assert time.process_time() - start < 10.0


def test_a_hundred_thousand_labels_are_drawn_by_their_number() -> None:
    values = (np.random.default_rng(1).random(100_000) < 0.1).astype(np.float64)
    start = time.process_time()
    found = bootstrap_mean(values, interval="percentile")
    seconds = time.process_time() - start
    error = np.sqrt(found.value * (1 - found.value) / 100_000)
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.1 * error)
    # A billion single draws take seconds.
    assert seconds < 2.0


def test_many_equal_sign_flips_agree_with_the_normal_distribution() -> None:
    moves = np.zeros(100_000)
    moves[:560], moves[560:1000] = 1.0, -1.0
    found = cluster_permutation(moves, range(100_000))
    assert found == pytest.approx(stats.binomtest(560, 1000).pvalue, abs=0.001)


def test_small_inputs_keep_their_stream() -> None:
    # Figures of reports: a change here is a change of numbers and belongs in the changelog.
    found = bootstrap_mean([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 2.0, 0.5, 0.25])
    assert (found.low, found.high) == (0.25, 1.075)
    assert cluster_permutation([1.0, -0.5, 0.25, 2.0] * 6, range(24)) == 0.0021997800219978004
