# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding: unbiased, one of two neighbours, the same wherever the tensor is cut."""

from __future__ import annotations

import math

import pytest
import torch

from keelwright.ops.philox import stream_key
from keelwright.ops.rounding import round_stochastically

KEY = stream_key(3, "model.layers.0.mlp.up_proj.weight")
NARROW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [1.001, -0.7, 1e-3, 3.3e-5])
def test_the_mean_is_the_value_within_four_sigma(dtype: torch.dtype, value: float) -> None:
    n = 200_000
    values = torch.full((n,), value)
    rounded = round_stochastically(values, dtype, key=KEY, offset=0).double()
    low, high = float(rounded.min()), float(rounded.max())
    exact = float(values[0])
    assert low <= exact <= high
    share = (exact - low) / (high - low) if high > low else 0.0
    sigma = (high - low) * math.sqrt(share * (1 - share) / n)
    assert abs(float(rounded.mean()) - exact) <= 4 * sigma
    # It must have been rounded both ways, but for a chance that n draws seldom meet.
    assert set(rounded.tolist()) == {low, high}
    assert (high > low) == (share * n > 20)


@pytest.mark.parametrize("dtype", NARROW)
def test_each_result_is_one_of_the_two_neighbours(dtype: torch.dtype) -> None:
    values = 3 * torch.randn(5000, generator=torch.Generator().manual_seed(0))
    rounded = round_stochastically(values, dtype, key=KEY, offset=0)
    every = torch.arange(2 ** (8 * dtype.itemsize)).to(torch.uint8 if dtype.itemsize == 1 else torch.int32)
    every = every if dtype.itemsize == 1 else every.to(torch.int16)
    grid = every.view(dtype).double()
    grid = grid[torch.isfinite(grid)].unique()
    place = torch.searchsorted(grid, values.double())
    found = rounded.double()
    assert ((found == grid[place]) | (found == grid[place - 1])).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_what_the_dtype_holds_is_untouched(dtype: torch.dtype) -> None:
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = torch.cat([exact, torch.tensor([0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).min]).to(dtype)])
    rounded = round_stochastically(exact.float(), dtype, key=KEY, offset=0)
    assert torch.equal(rounded.view(torch.uint8), exact.view(torch.uint8))


@pytest.mark.parametrize("cut", [1, 7, 64, 999])
def test_cuts_do_not_change_a_bit(cut: int) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    whole = round_stochastically(values, torch.bfloat16, key=KEY, offset=50)
    parts = [
        round_stochastically(values[at : at + cut], torch.bfloat16, key=KEY, offset=50 + at)
        for at in range(0, 1000, cut)
    ]
    assert torch.equal(torch.cat(parts), whole)
    other = round_stochastically(values, torch.bfloat16, key=stream_key(4, "other"), offset=50)
    assert not torch.equal(other, whole)


def test_many_small_changes_add_up_where_rounding_to_nearest_loses_them() -> None:
    n, steps, change = 4096, 64, 2.0**-12
    lucky = nearest = torch.ones(n, dtype=torch.bfloat16)
    for step in range(steps):
        lucky = round_stochastically(lucky.float() + change, torch.bfloat16, key=stream_key(step, "w"), offset=0)
        nearest = (nearest.float() + change).bfloat16()
    assert torch.equal(nearest, torch.ones(n, dtype=torch.bfloat16))
    # A step of bfloat16 at 1 is 2^-7: at most a quarter of its square is the variance of one rounding.
    sigma = math.sqrt(steps / n) * 2.0**-8
    assert abs(float(lucky.double().mean()) - (1 + steps * change)) <= 4 * sigma


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beyond_the_largest_number_it_is_as_to_nearest(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    values = torch.tensor([most, most * (1 + 2.0**-13), math.inf, -math.inf, math.nan])
    if dtype is torch.float16:
        values = torch.cat([values, torch.tensor([70000.0, -70000.0])])
    rounded = round_stochastically(values, dtype, key=KEY, offset=0)
    assert torch.equal(rounded.view(torch.int16), values.to(dtype).view(torch.int16))


def test_wide_values_and_none_at_all() -> None:
    values = torch.tensor([1.0 + 2.0**-40, -1.0 - 2.0**-9], dtype=torch.float64)
    rounded = round_stochastically(values, torch.float32, key=KEY, offset=0)
    assert rounded.dtype is torch.float32
    assert rounded.tolist() in ([1.0, -1.0 - 2.0**-9], [1.0 + 2.0**-23, -1.0 - 2.0**-9])
    assert round_stochastically(torch.empty(0), torch.bfloat16, key=KEY, offset=0).numel() == 0
    same = torch.randn(3)
    assert torch.equal(round_stochastically(same, torch.float32, key=KEY, offset=0), same)
