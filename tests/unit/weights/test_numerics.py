# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from keelwright.core.errors import NumericalError
from keelwright.weights.numerics import require_finite, round_once, working_dtype


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_named_with_role_tensor_and_index(bad: float) -> None:
    values = torch.zeros(10)
    values[7] = bad
    with pytest.raises(NumericalError) as caught:
        require_finite(values, role="tuned", name="model.norm.weight", offset=100, source="models/tuned")
    assert "'tuned'" in caught.value.problem
    assert "tensor 'model.norm.weight', element 107" in caught.value.problem
    assert caught.value.expected == "finite weights in models/tuned"
    assert str(bad) in str(caught.value.found)


def test_opposite_infinities_that_would_cancel_are_found() -> None:
    values = torch.tensor([float("inf"), float("-inf")])
    with pytest.raises(NumericalError, match="element 0"):
        require_finite(values, role="tuned", name="w", offset=0, source="s")


def test_finite_values_whose_sum_overflows_are_accepted() -> None:
    values = torch.full((4,), 3e38)
    require_finite(values, role="tuned", name="w", offset=0, source="s")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_round_to_even(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    values = torch.tensor([1 + step / 2, 1 + 3 * step / 2])
    assert round_once(values, dtype, name="w", offset=0).tolist() == [1.0, 1 + 2 * step]


def test_values_that_overflow_half_precision_are_counted() -> None:
    values = torch.tensor([1.0, 70000.0, -80000.0])
    with pytest.raises(NumericalError) as caught:
        round_once(values, torch.float16, name="w", offset=5)
    assert "tensor 'w', element 6" in caught.value.problem
    assert caught.value.expected == "values up to 65504 in float16"
    assert caught.value.found == "70000 (2 such elements in this part of the tensor)"
    assert "smaller coefficient" in str(caught.value.fix)


def test_values_just_above_the_largest_half_that_round_down_are_accepted() -> None:
    assert round_once(torch.tensor([65510.0]), torch.float16, name="w", offset=0).item() == 65504.0


def test_a_result_that_is_no_number_is_refused_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with pytest.raises(NumericalError, match="element 1"):
            round_once(torch.tensor([0.0, float("nan")]), dtype, name="w", offset=0)


def test_no_values_round_to_no_values() -> None:
    assert round_once(torch.empty(0), torch.bfloat16, name="w", offset=0).shape == (0,)


def test_only_double_outputs_are_evaluated_in_double() -> None:
    assert working_dtype(torch.float64) is torch.float64
    assert {working_dtype(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)} == {torch.float32}
