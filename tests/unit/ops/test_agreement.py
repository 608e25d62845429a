# SPDX-License-Identifier: Apache-2.0
"""Judges against the truth."""

from __future__ import annotations

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.ops.agreement import Confusion, cohen_kappa, confusion, rogan_gladen


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
