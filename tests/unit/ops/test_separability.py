# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from keelwright.core.errors import DataError, NumericalError
from keelwright.ops.separability import relative_update, separability, separability_drift, update_cosine

# Three layers of 4-d states, two prompts of each kind. Means by hand:
# layer 0: H (1,0,0,0), B (1,0,0,0): cos 1. Layer 1: H (1,0,0,0), B (0,2,0,0): cos 0.
# Layer 2: H (3,4,0,0), B (4,3,0,0): cos 24/25.
HARMFUL = torch.tensor([[[2.0, 0, 0, 0], [0, 0, 0, 0]], [[1, 1, 0, 0], [1, -1, 0, 0]], [[3, 4, 1, 0], [3, 4, -1, 0]]])
BENIGN = torch.tensor([[[1.0, 5, 0, 0], [1, -5, 0, 0]], [[0, 2, 0, 0], [0, 2, 0, 0]], [[4, 3, 0, 0], [4, 3, 0, 0]]])


def test_separability_of_hand_computed_states() -> None:
    assert separability(HARMFUL, BENIGN).tolist() == pytest.approx([0.0, 1.0, 0.04], abs=1e-12)


def test_opposite_means_are_two_apart() -> None:
    assert separability(HARMFUL, -HARMFUL).tolist() == pytest.approx([2.0, 2.0, 2.0])


def test_numbers_of_prompts_may_differ() -> None:
    assert separability(HARMFUL, BENIGN[:, :1])[1] == pytest.approx(1.0)


def test_drift_is_after_minus_before() -> None:
    before, after = separability(HARMFUL, BENIGN), separability(HARMFUL, HARMFUL)
    assert separability_drift(after, before).tolist() == pytest.approx([0.0, -1.0, -0.04], abs=1e-12)


def test_states_in_half_precision_are_averaged_in_float64() -> None:
    states = torch.full((1, 4096, 4), 16.0, dtype=torch.float16)
    assert separability(states, states)[0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("second", "expected"),
    [([2.0, 0, 0, 0], 1.0), ([-1.0, 0, 0, 0], -1.0), ([0.0, 3, 0, 0], 0.0), ([1.0, 1, 0, 0], 1 / math.sqrt(2))],
)
def test_cosine_of_two_changes(second: list[float], expected: float) -> None:
    first = torch.tensor([[1.0, 0], [0, 0]])
    assert update_cosine(first, torch.tensor(second).view(2, 2)) == pytest.approx(expected)


def test_relative_update_of_hand_computed_weights() -> None:
    original = torch.tensor([3.0, 4.0])
    assert relative_update(original, torch.tensor([3.0, 4.5])) == pytest.approx(0.1)
    assert relative_update(original, original) == 0.0
    with pytest.raises(NumericalError, match="zero weights"):
        relative_update(torch.zeros(2), original)


def test_what_has_no_direction_is_refused() -> None:
    with pytest.raises(NumericalError, match="mean state has no direction"):
        separability(torch.zeros(1, 2, 4), torch.ones(1, 2, 4))
    with pytest.raises(NumericalError, match="change has no direction"):
        update_cosine(torch.full((4,), float("nan")), torch.ones(4))


def test_an_empty_set_of_prompts_is_refused() -> None:
    with pytest.raises(DataError, match="3 and 0"):
        separability(torch.ones(1, 3, 4), torch.ones(1, 0, 4))
