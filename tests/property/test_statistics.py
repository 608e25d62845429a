# SPDX-License-Identifier: Apache-2.0
"""Identities that the statistics must keep for any counts."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from keelwright.ops.bootstrap import paired_bootstrap
from keelwright.ops.intervals import clopper_pearson, wilson
from keelwright.ops.paired import (
    benjamini_hochberg,
    holm,
    mcnemar_exact,
    minimum_detectable_change,
    non_inferiority,
    paired_difference,
)
from keelwright.ops.ranks import signed_ranks
from keelwright.ops.statistic import bootstrap_statistic, ratio, swap_test

Counts = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 200))
PValues = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12)


@settings(deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_hold_their_share_and_mirror(counts: tuple[int, int]) -> None:
    successes, n = counts
    for interval in (wilson, clopper_pearson):
        one, other = interval(successes, n), interval(n - successes, n)
        assert 0.0 <= one.low <= one.value <= one.high <= 1.0
        assert abs(one.low - (1.0 - other.high)) < 1e-9


@given(Counts)
def test_mcnemar_is_a_probability_and_symmetric(counts: tuple[int, int, int]) -> None:
    b, c, _ = counts
    p_value = mcnemar_exact(b, c)
    assert 0.0 < p_value <= 1.0
    assert p_value == mcnemar_exact(c, b)
    assert mcnemar_exact(b, c, mid_p=True) <= p_value
    assert mcnemar_exact(b, c, alternative="greater") == mcnemar_exact(c, b, alternative="less")


@given(Counts)
def test_paired_interval_holds_its_change(counts: tuple[int, int, int]) -> None:
    b, c, concordant = counts
    n = b + c + concordant
    if n == 0:
        return
    estimate = paired_difference(b, c, n)
    assert -1.0 <= estimate.low <= estimate.value <= estimate.high <= 1.0
    assert estimate.low < estimate.high


@given(Counts)
def test_paired_interval_excludes_zero_about_when_the_score_test_rejects(counts: tuple[int, int, int]) -> None:
    b, c, concordant = counts
    n = b + c + concordant
    if b + c == 0:
        return
    estimate = paired_difference(b, c, n)
    rejects = (b - c) ** 2 / (b + c) > 1.959963984540054**2
    if abs((b - c) ** 2 / (b + c) - 1.959963984540054**2) > 1e-6:
        assert rejects == (estimate.low > 0.0 or estimate.high < 0.0)


@given(PValues)
def test_adjusted_p_values_never_shrink_and_keep_their_order(p_values: list[float]) -> None:
    for adjust in (holm, benjamini_hochberg):
        adjusted = adjust(p_values)
        assert all(before <= after + 1e-12 <= 1.0 + 1e-9 for before, after in zip(p_values, adjusted, strict=True))
        order = sorted(range(len(p_values)), key=lambda i: p_values[i])
        assert [adjusted[i] for i in order] == sorted(adjusted)
    assert all(bh <= h + 1e-12 for bh, h in zip(benjamini_hochberg(p_values), holm(p_values), strict=True))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2000), st.floats(0.0, 1.0))
def test_more_pairs_detect_smaller_changes(n: int, share: float) -> None:
    assert minimum_detectable_change(2 * n, share) <= minimum_detectable_change(n, share)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40), st.randoms(use_true_random=False))
def test_paired_change_does_not_depend_on_the_order_of_pairs(pairs: list[tuple[bool, bool]], random: Random) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)
    one, other = (
        paired_bootstrap([float(b) for b, _ in some], [float(a) for _, a in some]) for some in (pairs, shuffled)
    )
    assert abs(one.value - other.value) < 1e-12
    assert one.low <= one.value <= one.high


@settings(max_examples=40, deadline=None)
@given(Counts)
def test_swapping_labels_is_exact_mcnemar(counts: tuple[int, int, int]) -> None:
    b, c, concordant = counts
    before = np.repeat([0.0, 1.0, 1.0], [b, c, concordant + 2])
    after = np.repeat([1.0, 0.0, 1.0], [b, c, concordant + 2])
    sides = [np.stack([labels, np.ones_like(labels)], axis=1) for labels in (before, after)]
    assert abs(swap_test(*sides, ratio) - mcnemar_exact(b, c)) < 1e-9


@settings(max_examples=40, deadline=None)
@given(Counts)
def test_margins_beyond_the_limit_are_held_and_others_are_not(counts: tuple[int, int, int]) -> None:
    b, c, concordant = counts
    n = b + c + concordant
    if n == 0:
        return
    limit = paired_difference(b, c, n, confidence=0.9).high
    for margin in (limit + 0.01, limit - 0.01):
        if 0.0 < margin < 1.0:
            found = non_inferiority(b, c, n, margin=margin)
            assert found.holds == (margin > limit) == (found.p_value < 0.05)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=150))
def test_signed_ranks_mirror_and_are_probabilities(changes: list[int]) -> None:
    zero, moved = np.zeros(len(changes)), np.array(changes, dtype=np.float64)
    one, other = signed_ranks(zero, moved), signed_ranks(moved, zero)
    assert 0.0 < one.p_value <= 1.0
    assert abs(one.p_value - other.p_value) < 1e-12
    assert (one.above, one.below) == (other.below, other.above)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.booleans(), min_size=6, max_size=60), st.integers(2, 6))
def test_repeating_units_within_their_cluster_changes_nothing(labels: list[bool], times: int) -> None:
    values = np.array(labels, dtype=np.float64)
    columns = np.stack([values, np.ones_like(values)], axis=1)
    clusters = np.arange(len(values))
    alone = bootstrap_statistic(columns, ratio, clusters=clusters.tolist(), resamples=400)
    repeated = bootstrap_statistic(
        np.repeat(columns, times, axis=0), ratio, clusters=np.repeat(clusters, times).tolist(), resamples=400
    )
    assert abs(alone.low - repeated.low) + abs(alone.high - repeated.high) < 1e-9
