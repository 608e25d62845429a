# SPDX-License-Identifier: Apache-2.0
"""Gradients of one process; two processes are in integration/test_distributed_training.py."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from keelwright.training.processes import Replicated, in_float32, local


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision_weights_are_float32(dtype: torch.dtype) -> None:
    weight, unused = (torch.ones(3, dtype=dtype, requires_grad=True) for _ in range(2))
    found = Replicated(Accelerator(device_placement=False)).gradient((weight.float() * 2).sum(), [weight, unused])
    assert found[0] is not None
    assert found[0].dtype == torch.float32
    assert found[1] is None


def test_the_difference_of_two_near_gradients_survives_in_float32() -> None:
    first, second = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)
    left, right = in_float32([first, second])
    assert left is not None and right is not None
    # bfloat16 has eight bits: 256 + 1 is 256 there.
    assert float((left * 256 + right) - left * 256) == float(right)
    assert float((first * 256 + second) - first * 256) != float(second)


def test_float32_gradients_are_not_copied() -> None:
    gradient = torch.ones(3)
    assert in_float32([gradient, None])[0] is gradient


def test_the_part_of_a_whole_tensor_shares_its_memory() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    local(weight).add_(1.0)
    assert torch.equal(weight, torch.ones(3))
