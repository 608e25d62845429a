# SPDX-License-Identifier: Apache-2.0
"""Gradients as lists of tensors."""

from __future__ import annotations

import pytest
import torch

from keelwright.ops.gradients import add_scaled, dot, scaled, squared_norm

ONE = [torch.tensor([3.0, 0.0]), None, torch.tensor([[4.0]]), None]
TWO = [torch.tensor([1.0, 2.0]), torch.tensor([5.0]), None, None]


def test_none_counts_as_zero_in_a_sum() -> None:
    found = add_scaled(ONE, TWO, 2.0)
    assert [None if one is None else one.tolist() for one in found] == [[5.0, 4.0], [10.0], [[4.0]], None]


def test_neither_argument_of_a_sum_is_changed() -> None:
    one, two = torch.ones(2), torch.ones(2)
    add_scaled([one], [two], 3.0)
    assert one.tolist() == two.tolist() == [1.0, 1.0]


def test_a_sum_with_nothing_is_the_same_tensor() -> None:
    one = torch.ones(2)
    assert add_scaled([None], [one])[0] is one
    assert add_scaled([one], [None])[0] is one
    assert scaled([one], 1.0)[0] is one


def test_scaling_leaves_none_alone() -> None:
    found = scaled(ONE, -0.5)
    assert found[1] is None
    assert found[0] is not None
    assert found[0].tolist() == [-1.5, 0.0]


def test_the_norm_is_over_all_tensors_together() -> None:
    assert float(squared_norm(ONE)) == pytest.approx(25.0)
    assert float(squared_norm([None, None])) == 0.0


def test_a_norm_of_half_precision_is_summed_in_float32() -> None:
    # 65536 entries of 1/16 have norm 16; float16 cannot hold the running sum of squares that leads there, nor can
    # bfloat16 count beyond 256.
    for dtype in (torch.float16, torch.bfloat16):
        found = squared_norm([torch.full((65536,), 0.0625, dtype=dtype)])
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(256.0, rel=1e-5)
    assert float(squared_norm([torch.tensor([300.0], dtype=torch.float16)])) == pytest.approx(90000.0)


def test_dot_product_over_what_both_have() -> None:
    assert float(dot(ONE, TWO)) == 3.0
    assert float(dot([None], [torch.ones(1)])) == 0.0
    assert dot(ONE, TWO).dtype == torch.float64


def test_dot_product_of_a_gradient_with_itself_is_its_squared_norm() -> None:
    values = [torch.randn(7, generator=torch.Generator().manual_seed(1)), None, torch.full((3, 2), 0.25)]
    assert float(dot(values, values)) == pytest.approx(float(squared_norm(values)), rel=1e-6)
