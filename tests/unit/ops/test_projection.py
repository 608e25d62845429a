# SPDX-License-Identifier: Apache-2.0
"""Subspaces of a matrix, against torch's own decompositions and by hand."""

import pytest
import torch

from keelwright.ops.projection import (
    cosine,
    frobenius,
    leading_directions,
    project,
    project_on,
    rank_for_energy,
    scaled_product,
    sketched_directions,
)


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 4), (4, 1)])
def test_leading_directions_are_those_of_the_decomposition(shape):
    one = matrix(*shape)
    u, s, _ = torch.linalg.svd(one.double(), full_matrices=False)
    found = leading_directions(one, rank=2)
    count = min(2, *shape)
    assert found.left and found.vectors.shape == (shape[0], count)
    assert torch.allclose(found.values, s[:count], rtol=1e-9)
    assert torch.allclose((found.vectors.T @ u[:, :count]).abs(), torch.eye(count, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_truncation_from_the_shorter_side_is_the_best_one(shape):
    one = matrix(*shape)
    u, s, v = torch.linalg.svd(one.double(), full_matrices=False)
    best = (u[:, :2] * s[:2]) @ v[:2]
    found = project(leading_directions(one, rank=2, side="shorter"), one)
    assert torch.allclose(found.double(), best, atol=1e-6)


def test_a_sketch_finds_the_same_directions_and_is_a_function_of_the_seed():
    one = matrix(30, 20) @ torch.diag(0.5 ** torch.arange(20.0))
    exact = project(leading_directions(one, rank=3), one)
    assert torch.allclose(project(sketched_directions(one, rank=3, seed=1), one), exact, atol=1e-5)
    again = [sketched_directions(one, rank=3, seed=1).vectors for _ in range(2)]
    assert torch.equal(*again)


def test_rank_for_energy_is_the_smallest_that_suffices():
    squares = torch.tensor([8.0, 1.0, 1.0], dtype=torch.float64)
    assert [rank_for_energy(squares, share) for share in (0.5, 0.8, 0.81, 0.9, 1.0)] == [1, 1, 2, 2, 3]
    assert rank_for_energy(torch.zeros(3), 0.9) == 0


def test_directions_stop_at_the_numerical_rank():
    one = torch.outer(torch.arange(1.0, 6.0), torch.arange(1.0, 4.0))
    assert leading_directions(one, rank=3).vectors.shape == (5, 1)
    assert leading_directions(torch.zeros(3, 2), energy=0.9).vectors.shape == (3, 0)
    assert sketched_directions(one, rank=3, seed=0).vectors.shape == (5, 1)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3)])
def test_the_scaled_product_is_that_of_the_formed_matrix_in_either_order(shape):
    subspace, other = matrix(*shape), matrix(shape[0], 5, 1)
    expected = subspace @ subspace.T @ other / subspace.norm()
    assert torch.allclose(scaled_product(subspace, other), expected, atol=1e-5)
    assert not scaled_product(torch.zeros(shape), other).any()


def test_the_stand_in_scales_with_the_subspace_and_the_projector_does_not():
    subspace, other = matrix(6, 4), matrix(6, 5, 1)
    scaled = [project_on(c * subspace, other, projector="safe_lora") for c in (1.0, 3.0)]
    true = [project_on(c * subspace, other, projector="exact_topk", energy=0.9) for c in (1.0, 3.0)]
    assert torch.allclose(3.0 * scaled[0], scaled[1], atol=1e-5)
    assert torch.allclose(*true, atol=1e-6)


def test_cosines_and_norms_by_hand():
    one, other = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert frobenius(one) == 5.0
    assert cosine(one, other) == pytest.approx(24 / 25)
    assert cosine(one, one) == 1.0 and cosine(one, torch.zeros(1, 2)) == 0.0
