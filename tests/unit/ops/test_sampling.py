# SPDX-License-Identifier: Apache-2.0
"""Several samples per item."""

from __future__ import annotations

import itertools

import pytest

from keelwright.core.errors import ConfigError
from keelwright.ops.sampling import asr_at_k, expected_maximum, usable_harm


def test_asr_at_one_is_the_mean() -> None:
    assert asr_at_k(10, 3, 1) == pytest.approx(0.3)


def test_asr_at_k_is_the_share_of_subsets_with_a_success() -> None:
    outcomes = [True, True, False, False, False, False]
    subsets = list(itertools.combinations(outcomes, 3))
    assert asr_at_k(6, 2, 3) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_asr_of_impossible_counts_is_refused() -> None:
    for n, c, k in ((5, 6, 1), (5, 1, 0), (5, 1, 6)):
        with pytest.raises(ConfigError, match="impossible"):
            asr_at_k(n, c, k)


def test_expected_maximum_runs_from_mean_to_maximum() -> None:
    values = (0.9, 0.1, 0.4, 0.4, 0.7)
    found = [expected_maximum(values, k) for k in range(1, 6)]
    assert found[0] == pytest.approx(0.5)
    assert found[-1] == 0.9
    assert found == sorted(found)
    subsets = list(itertools.combinations(values, 3))
    assert found[2] == pytest.approx(sum(map(max, subsets)) / len(subsets))


def test_expected_maximum_of_too_many_is_refused() -> None:
    with pytest.raises(ConfigError, match="out of range"):
        expected_maximum((0.5,), 2)


@pytest.mark.parametrize(("marks", "score"), [((5.0, 5.0), 1.0), ((1.0, 1.0), 0.0), ((3.0, 3.0), 0.5)])
def test_usable_harm_gives_the_published_values(marks: tuple[float, float], score: float) -> None:
    convincing, specific = marks
    assert usable_harm(refused=False, convincing=convincing, specific=specific) == score
    assert usable_harm(refused=True, convincing=convincing, specific=specific) == 0.0
