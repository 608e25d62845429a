# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from keelwright.ops.mmd import mmd, squared_distances


def _normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def _slow(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the same by loops over pairs, in float64."""
    points = torch.cat([first, second]).double()
    n = len(points)
    far = [[float((a - b).square().sum()) for b in points] for a in points]
    spread = sum(map(sum, far)) / (n * n - n)
    kernel = [[sum(math.exp(-one / (spread * 2**i / 4)) for i in range(5)) for one in row] for row in far]
    cut = len(first)

    def block(rows: range, columns: range) -> float:
        return sum(kernel[i][j] for i in rows for j in columns) / (len(rows) * len(columns))

    left, right = range(cut), range(cut, n)
    return block(left, left) + block(right, right) - block(left, right) - block(right, left)


def test_a_sample_has_no_distance_from_itself() -> None:
    points = _normal(7, 300, seed=0) + 5.0
    assert float(mmd(points, points.clone())) == pytest.approx(0.0, abs=1e-6)


def test_the_order_of_samples_does_not_matter() -> None:
    first, second = _normal(5, 20, seed=0), _normal(9, 20, seed=1) + 1.0
    assert float(mmd(first, second)) == pytest.approx(float(mmd(second, first)), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_never_below_zero(seed: int) -> None:
    assert float(mmd(_normal(4, 50, seed), _normal(6, 50, seed + 100))) >= -1e-6


def test_two_samples_of_one_distribution_come_together_as_they_grow() -> None:
    # Measured: .34, .029, .0024.
    found = [float(mmd(_normal(n, 8, seed=1), _normal(n, 8, seed=2))) for n in (10, 100, 1000)]
    assert found[0] > 5 * found[1] > 25 * found[2]
    assert found[2] < 0.01


def test_it_equals_loops_over_pairs() -> None:
    first, second = _normal(6, 11, seed=3), 0.5 * _normal(4, 11, seed=4) + 1.0
    assert float(mmd(first, second)) == pytest.approx(_slow(first, second), rel=1e-5)


def test_two_points_on_a_line_have_the_known_value() -> None:
    # X = {0}, Y = {3}: one distance, so s = 9, and 2 * (5 - sum of exp(-4 / 2^i)).
    known = 2.0 * (5.0 - sum(math.exp(-4.0 / 2**i) for i in range(5)))
    assert float(mmd(torch.tensor([[0.0]]), torch.tensor([[3.0]]))) == pytest.approx(known, rel=1e-6)


def test_two_sets_of_two_points_have_the_known_value_at_a_given_bandwidth() -> None:
    # X = {0, 2}, Y = {1, 3}, s = 4: s_i = 1, 2, 4, 8, 16; squared distances within 4, across 1, 9, 1, 1.
    def kernel(squared: float) -> float:
        return sum(math.exp(-squared / width) for width in (1, 2, 4, 8, 16))

    within, across = (kernel(0) + kernel(4)) / 2, (3 * kernel(1) + kernel(9)) / 4
    points = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])
    assert float(mmd(*points, bandwidth=4.0)) == pytest.approx(2 * within - 2 * across, rel=1e-5)


def test_points_that_all_lie_in_one_place_give_zero_and_a_gradient() -> None:
    points = torch.zeros(3, 4, requires_grad=True)
    found = mmd(points, torch.zeros(3, 4))
    found.backward()
    assert float(found.detach()) == 0.0
    assert torch.equal(points.grad, torch.zeros(3, 4))


def test_an_empty_sample_gives_zero() -> None:
    assert float(mmd(torch.zeros(0, 4), _normal(3, 4, seed=0) * 0)) == 0.0


def test_no_gradient_flows_through_the_bandwidth() -> None:
    first, second = _normal(4, 6, seed=5).requires_grad_(), _normal(4, 6, seed=6)
    distances = squared_distances(torch.cat([first, second]).detach())
    fixed = float(distances.sum() / 56)
    (free,) = torch.autograd.grad(mmd(first, second), first)
    (held,) = torch.autograd.grad(mmd(first, second, bandwidth=fixed), first)
    torch.testing.assert_close(free, held)


def test_distances_keep_their_digits_far_from_the_origin() -> None:
    points = _normal(5, 30, seed=7)
    near, far = squared_distances(points), squared_distances(points + 1000.0)
    torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-3)
    assert torch.equal(near.diagonal(), torch.zeros(5))
    torch.testing.assert_close(near, torch.cdist(points, points).square(), rtol=1e-4, atol=1e-4)
