# SPDX-License-Identifier: Apache-2.0
"""Judges against the truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from keelwright.core.errors import ConfigError, DataError
from keelwright.ops.agreement import (
    Confusion,
    cohen_kappa,
    confusion,
    judge_shift,
    kappa_interval,
    rogan_gladen,
    rogan_gladen_interval,
    weighted_kappa,
)


def test_rogan_gladen_gives_the_published_value() -> None:
    assert round(rogan_gladen(0.30, sensitivity=0.9, specificity=0.95), 4) == 0.2941


def test_rogan_gladen_stays_within_zero_and_one() -> None:
    assert rogan_gladen(0.01, sensitivity=0.9, specificity=0.9) == 0.0
    assert rogan_gladen(0.99, sensitivity=0.9, specificity=0.9) == 1.0


def test_a_judge_close_to_guessing_is_not_corrected_for() -> None:
    with pytest.raises(ConfigError, match="too close to guessing") as caught:
        rogan_gladen(0.3, sensitivity=0.6, specificity=0.5)
    assert caught.value.expected == "sensitivity + specificity above 1.1"


def test_counts_of_the_shipped_string_match_give_the_published_figures() -> None:
    for counts, figures in (
        (Confusion(16, 60, 3, 371), (0.21, 0.99, 0.29)),
        (Confusion(163, 77, 9, 201), (0.68, 0.96, 0.62)),
    ):
        found = (counts.sensitivity.value, counts.specificity.value, counts.kappa)
        assert tuple(round(value, 2) for value in found) == figures


def test_confusion_counts_each_case() -> None:
    truth = [True, True, True, False, False]
    said = [True, False, True, True, False]
    assert confusion(truth, said) == Confusion(tp=2, fn=1, fp=1, tn=1)


def test_kappa_is_one_for_agreement_zero_for_chance_and_negative_for_contradiction() -> None:
    assert cohen_kappa("aabbc", "aabbc") == 1.0
    assert cohen_kappa("aabb", "abab") == 0.0
    assert cohen_kappa("ab", "ba") == -1.0
    assert cohen_kappa("aa", "aa") == 1.0


def test_kappa_of_nothing_or_of_other_items_is_refused() -> None:
    with pytest.raises(DataError, match="no items"):
        cohen_kappa("", "")
    with pytest.raises(DataError, match="same items"):
        cohen_kappa("ab", "a")


def _marks(seed: int, n: int = 150) -> tuple[list[int], list[int]]:
    rng = np.random.default_rng(seed)
    first = rng.integers(1, 6, size=n)
    return first.tolist(), np.clip(first + rng.integers(-1, 2, size=n) * rng.integers(0, 3, size=n), 1, 5).tolist()


def test_quadratic_kappa_is_the_concordance_coefficient() -> None:
    # With squared distances, 1 - observed / expected is Lin's concordance of the two raters' marks.
    first, second = _marks(1)
    a, b = np.array(first, dtype=float), np.array(second, dtype=float)
    concordance = 2 * np.cov(a, b, bias=True)[0, 1] / (a.var() + b.var() + (a.mean() - b.mean()) ** 2)
    assert weighted_kappa(first, second, categories=(1, 2, 3, 4, 5)) == pytest.approx(concordance)


def test_linear_kappa_is_the_mean_of_the_kappas_at_each_cut() -> None:
    # Vanbelle and Albert 2009: weighted by one minus the agreement of chance at the cut.
    first, second = _marks(2)
    above = below = 0.0
    for cut in (1, 2, 3, 4):
        a, b = [one > cut for one in first], [one > cut for one in second]
        chance = np.mean(a) * np.mean(b) + (1 - np.mean(a)) * (1 - np.mean(b))
        above += cohen_kappa(a, b) * (1 - chance)
        below += 1 - chance
    assert weighted_kappa(first, second, categories=(1, 2, 3, 4, 5), weights="linear") == pytest.approx(above / below)


def test_nominal_weights_give_cohens_kappa() -> None:
    first, second = _marks(3)
    expected = cohen_kappa(first, second)
    assert weighted_kappa(first, second, categories=(1, 2, 3, 4, 5), weights="nominal") == pytest.approx(expected)
    assert weighted_kappa("aa", "aa", categories="ab") == 1.0


def test_a_label_outside_the_categories_is_refused() -> None:
    with pytest.raises(DataError, match="not among the categories") as caught:
        weighted_kappa([1, 7], [1, 2], categories=(1, 2, 3))
    assert caught.value.found == "7"


def test_interval_of_kappa_agrees_with_scipy() -> None:
    first, second = _marks(4)
    found = kappa_interval(first, second, categories=(1, 2, 3, 4, 5), weights="quadratic")

    def kappa(a: np.ndarray, b: np.ndarray) -> float:
        return 2 * np.cov(a, b, bias=True)[0, 1] / (a.var() + b.var() + (a.mean() - b.mean()) ** 2)

    theirs = stats.bootstrap(
        (np.array(first), np.array(second)),
        kappa,
        paired=True,
        vectorized=False,
        n_resamples=3000,
        rng=np.random.default_rng(0),
    )
    width = found.high - found.low
    assert found.value == pytest.approx(weighted_kappa(first, second, categories=(1, 2, 3, 4, 5)))
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.06 * width)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.06 * width)


def test_kappa_of_one_class_has_no_interval() -> None:
    with pytest.raises(DataError, match="not defined"):
        kappa_interval("aaaa", "aaaa", categories="ab")


def test_corrected_rate_has_the_interval_of_the_delta_method_where_samples_are_large() -> None:
    flagged = [True] * 600 + [False] * 1400
    judge = Confusion(tp=900, fn=100, fp=50, tn=950)
    found = rogan_gladen_interval(flagged, judge)
    assert found.value == pytest.approx(rogan_gladen(0.3, sensitivity=0.9, specificity=0.95))
    rate, informed = found.value, 0.85
    parts = (0.3 * 0.7 / 2000, rate**2 * 0.9 * 0.1 / 1000, (1 - rate) ** 2 * 0.95 * 0.05 / 1000)
    half = 1.96 * np.sqrt(sum(parts)) / informed
    assert found.low == pytest.approx(rate - half, abs=0.1 * half)
    assert found.high == pytest.approx(rate + half, abs=0.1 * half)
    assert found.n == 2000


def test_a_small_validation_sample_widens_the_corrected_interval() -> None:
    flagged = [True] * 300 + [False] * 700
    large = rogan_gladen_interval(flagged, Confusion(400, 0, 0, 400))
    small = rogan_gladen_interval(flagged, Confusion(20, 0, 0, 20))
    assert small.value == large.value == pytest.approx(0.3)
    assert small.high - small.low > 1.5 * (large.high - large.low)


def test_corrected_interval_is_wider_by_cluster() -> None:
    flagged = ([True] * 5 + [False] * 15) * 20
    judge = Confusion(180, 20, 10, 190)
    clusters = [place // 5 for place in range(400)]
    by_item, by_cluster = (
        rogan_gladen_interval(flagged, judge),
        rogan_gladen_interval(flagged, judge, clusters=clusters),
    )
    assert by_cluster.high - by_cluster.low > 1.5 * (by_item.high - by_item.low)


def test_a_judge_close_to_guessing_has_no_corrected_interval() -> None:
    with pytest.raises(ConfigError, match="too close to guessing"):
        rogan_gladen_interval([True, False], Confusion(12, 8, 10, 10))
    with pytest.raises(ConfigError, match="too small to correct") as caught:
        rogan_gladen_interval([True, False] * 20, Confusion(2, 1, 1, 2))
    assert caught.value.found == "2 of 3 and 2 of 3 right"


def test_a_judge_that_errs_differently_after_the_change_is_flagged() -> None:
    steady = judge_shift(Confusion(80, 20, 5, 95), Confusion(78, 22, 4, 96))
    shifted = judge_shift(Confusion(80, 20, 5, 95), Confusion(40, 60, 4, 96))
    assert not steady.biased
    assert shifted.biased
    assert shifted.sensitivity_p == pytest.approx(stats.fisher_exact([[80, 20], [40, 60]]).pvalue)
    assert shifted.sentence.startswith(
        "the judge errs differently before and after, so the paired comparison is biased"
    )
    assert "sensitivity 0.80 of 100 before, 0.40 of 100 after" in shifted.sentence
    assert steady.sentence.startswith("no evidence that the judge errs differently")


def test_labels_of_one_class_cannot_show_a_shift() -> None:
    with pytest.raises(ConfigError, match="lack one true class") as caught:
        judge_shift(Confusion(5, 5, 5, 5), Confusion(0, 0, 5, 5))
    assert caught.value.found == "0 true, 10 other"


def test_a_corrected_rate_of_no_events_has_room_above_it():
    judge = Confusion(tp=90, fn=10, fp=5, tn=95)
    nothing = rogan_gladen_interval([False] * 50, judge)
    assert nothing.value == 0.0
    # The exact bound after no event in 50 is 0.058; a judge that misses a tenth cannot make it much smaller.
    assert 0.01 < nothing.high < 0.12
    everything = rogan_gladen_interval([True] * 50, judge, clusters=[i // 5 for i in range(50)])
    assert everything.value == 1.0
    assert everything.low < 0.95


def test_full_agreement_on_few_items_is_not_certain():
    few, many = (
        kappa_interval(labels, labels, categories=(False, True)) for labels in ([True, False] * 10, [True, False] * 500)
    )
    assert few.value == many.value == 1.0
    # 0 of 20 may be up to 13.9 % of all, and half of the pairs would differ by chance.
    assert few.low == pytest.approx(1.0 - (1.0 - 0.05 ** (1 / 20)) / 0.5)
    assert few.low < many.low < 1.0 == many.high
