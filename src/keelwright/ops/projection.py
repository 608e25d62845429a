# SPDX-License-Identifier: Apache-2.0
"""Subspaces of a matrix: its leading directions, its truncation, and how far another matrix lies inside.

Decompositions run in float64 through the Gram matrix of the shorter side, which costs `O(short^2 long)` and keeps
singular values down to about 1e-8 of the largest: what a difference of float32 weights can hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.core.seeds import generator

Projector = Literal["safe_lora", "exact_topk"]
"""safe_lora: `V V^T / ||V||_F`, no projection; exact_topk: `U_k U_k^T` with the leading left singular vectors of V."""

_ZERO_BELOW = 1e-14
"""Share of the largest eigenvalue of a Gram matrix below which an eigenvalue is rounding."""


@dataclass(frozen=True, slots=True)
class Directions:
    """Leading singular directions of a matrix, largest first."""

    vectors: Float[Tensor, "side rank"]
    """Orthonormal columns, float64: left singular vectors where `left`, else right ones."""
    values: Float[Tensor, " rank"]
    """Singular values, float64."""
    left: bool


def rank_for_energy(squares: Float[Tensor, " n"], energy: float) -> int:
    """Return how many leading values hold a share `energy` of the sum; 0 where the sum is 0.

    Args:
        squares: Squared singular values, largest first.
        energy: Share wanted, 0 < energy <= 1.
    """
    total = float(squares.sum())
    if total <= 0.0:
        return 0
    reached = torch.cumsum(squares, 0) >= energy * total * (1.0 - 1e-12)
    return int(reached.nonzero()[0, 0]) + 1


def leading_directions(
    matrix: Float[Tensor, "rows columns"],
    *,
    rank: int | None = None,
    energy: float = 1.0,
    side: Literal["left", "shorter"] = "left",
) -> Directions:
    """Return the leading singular directions of a matrix.

    Args:
        matrix: Any shape; evaluated in float64.
        rank: How many; None takes as many as `energy` needs. Never more than the numerical rank.
        energy: Share of the squared Frobenius norm, where `rank` is None.
        side: Left singular vectors, or those of the shorter side, which are cheaper.
    """
    wide = matrix.double()
    rows, columns = wide.shape
    left = rows <= columns
    products = wide @ wide.T if left else wide.T @ wide
    squares, vectors = torch.linalg.eigh(products)
    squares, vectors = squares.flip(0).clamp_min(0.0), vectors.flip(1)
    known = int((squares > _ZERO_BELOW * squares[:1]).sum()) if squares.numel() else 0
    count = min(known, rank_for_energy(squares, energy) if rank is None else rank)
    squares, vectors = squares[:count], vectors[:, :count]
    values = squares.sqrt()
    if side == "left" and not left:
        # Orthonormal again: dividing by small singular values loses some of it.
        vectors, left = torch.linalg.qr(wide @ (vectors / values))[0], True
    return Directions(vectors, values, left)


def sketched_directions(
    matrix: Float[Tensor, "rows columns"], *, rank: int, seed: int, oversample: int = 8, iterations: int = 4
) -> Directions:
    """Return approximate leading left singular directions from a random sketch: `O(rows columns rank)`.

    Args:
        matrix: Any shape; evaluated in float64.
        rank: How many.
        seed: Of the sketch.
        oversample: Extra directions in the sketch.
        iterations: Power iterations; more separate close singular values better.

    Source:
        Halko, Martinsson, Tropp: Finding structure with randomness, SIAM Review 2011, algorithms 4.4 and 5.1.
    """
    wide = matrix.double()
    size = min(rank + oversample, *wide.shape)
    sketch = torch.randn(wide.shape[1], size, dtype=torch.float64, generator=generator(seed, "sketch"))
    basis = torch.linalg.qr(wide @ sketch)[0]
    for _ in range(iterations):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis)[0])[0]
    inner, values, _ = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    known = int((values > math.sqrt(_ZERO_BELOW) * values[:1]).sum()) if values.numel() else 0
    count = min(rank, known)
    return Directions((basis @ inner)[:, :count], values[:count], True)


def project(directions: Directions, matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Return `U U^T M` for left directions and `M V V^T` for right ones, in the dtype of `matrix`."""
    vectors, wide = directions.vectors, matrix.double()
    inside = vectors @ (vectors.T @ wide) if directions.left else (wide @ vectors) @ vectors.T
    return inside.to(matrix.dtype)


def scaled_product(
    subspace: Float[Tensor, "rows columns"], matrix: Float[Tensor, "rows other"]
) -> Float[Tensor, "rows other"]:
    """Return `V V^T M / ||V||_F` without forming `V V^T` where that is dearer; zero where V is zero.

    Args:
        subspace: V.
        matrix: M, in the same dtype; the result has it too. The norm is summed in float64.
    """
    size = frobenius(subspace)
    if size == 0.0:
        return torch.zeros_like(matrix)
    rows, columns = subspace.shape
    other = matrix.shape[1]
    outer = rows * rows * (columns + other)
    inner = 2 * rows * columns * other
    found = (subspace @ subspace.T) @ matrix if outer < inner else subspace @ (subspace.T @ matrix)
    return found / size


def project_on(
    subspace: Float[Tensor, "rows columns"],
    matrix: Float[Tensor, "rows other"],
    *,
    projector: Projector,
    rank: int | None = None,
    energy: float = 0.9,
) -> Float[Tensor, "rows other"]:
    """Return a matrix projected on the column space of `subspace`, by the stand-in or by a true projector.

    Args:
        subspace: V, for example aligned minus base weights.
        matrix: What is projected, for example the drift or a LoRA's left factor.
        projector: Which of the two.
        rank: Only for `exact_topk`: number of directions; None takes as many as `energy` needs.
        energy: Only for `exact_topk`: share of `||V||_F^2` that the directions hold.
    """
    if projector == "safe_lora":
        return scaled_product(subspace, matrix)
    return project(leading_directions(subspace, rank=rank, energy=energy), matrix)


def frobenius(matrix: Float[Tensor, "*shape"]) -> float:
    """Return the Frobenius norm, summed in float64."""
    return math.sqrt(float(matrix.double().square().sum()))


def cosine(one: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"]) -> float:
    """Return the cosine of two tensors as vectors, in float64 and within [-1, 1]; 0 where one is zero."""
    sizes = frobenius(one) * frobenius(other)
    if sizes == 0.0:
        return 0.0
    return min(1.0, max(-1.0, float((one.double() * other.double()).sum()) / sizes))
