# SPDX-License-Identifier: Apache-2.0
"""Weighted sums around an origin."""

import pytest
import torch

from keelwright.ops.affine import sum_from_base

BASE, ONE, TWO = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0]), torch.tensor([1.0, 6.0])


@pytest.mark.parametrize("weights", [(0.5, 0.25), (0.25, 0.75), (1.5, -1.0), (40.0, -30.0), (0.0, 0.0)])
def test_it_is_the_base_and_weighted_differences(weights):
    wanted = BASE + weights[0] * (ONE - BASE) + weights[1] * (TWO - BASE)
    assert torch.allclose(sum_from_base((ONE, TWO), weights, BASE), wanted, rtol=1e-6, atol=1e-6)


def test_without_a_base_it_is_the_plain_sum():
    assert torch.equal(sum_from_base((ONE, TWO), (0.5, 2.0)), 0.5 * ONE + 2.0 * TWO)


def test_entries_on_which_all_agree_stay_to_the_bit():
    shared = torch.tensor([0.1, 1 / 3, -1e-30])
    for weights in ((0.3, 0.7), (0.3, 0.3), (7.0, -5.0)):
        assert torch.equal(sum_from_base((shared, shared.clone()), weights, shared.clone()), shared)
    assert torch.equal(sum_from_base((shared, shared.clone()), (0.3, 0.7)), shared)


def test_weights_that_sum_to_one_leave_the_base_out():
    # 1e8 would swallow the digits of the others.
    assert torch.equal(sum_from_base((ONE, TWO), (0.5, 0.5), torch.full((2,), 1e8)), torch.tensor([2.0, 4.0]))


def test_large_weights_of_opposite_sign_keep_the_digits_of_a_small_move():
    base = torch.tensor([1.0])
    one, two = torch.tensor([1.0 + 2**-20]), torch.tensor([1.0 + 2**-21])
    exact = 1.0 + 700.0 * 2**-20 - 699.5 * 2**-21
    assert abs(float(sum_from_base((one, two), (700.0, -699.5), base)) - exact) <= 2**-23


def test_arguments_are_left_alone():
    copies = [one.clone() for one in (ONE, TWO, BASE)]
    for weights in ((0.5, 0.2), (9.0, 3.0), (0.5, 0.5)):
        sum_from_base((ONE, TWO), weights, BASE)
    assert all(torch.equal(one, two) for one, two in zip((ONE, TWO, BASE), copies, strict=True))
