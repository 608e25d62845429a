# SPDX-License-Identifier: Apache-2.0
"""Low-rank approximation of a matrix, and of a product that is low-rank already.

What it is: the best approximation of given rank in the Frobenius norm is the truncated singular value decomposition
(Eckart and Young). Three ways to it, all summed in float64 whatever the input's dtype:

- `recompress`: of `left @ right` by two QR factorisations and the SVD of an `R x R` matrix, `O((m + n) R^2)`; the
  `m x n` product is never formed.
- `exact_lowrank`: of a matrix, from the eigenvectors of the Gram matrix of its smaller side. Squaring the matrix loses
  the singular values below about 1e-8 of the largest; the approximation itself loses nothing that float32 could show,
  because it is the projection of the matrix on the space that was found, and its error is measured, not derived.
- `randomised_lowrank`: the same from a random sketch with power iterations, `O(m n k)`; for a matrix whose sides are
  much larger than the rank.

Source:
    Halko, Martinsson and Tropp, arXiv 0909.4061, Algorithms 4.4 and 5.1 (range finder with power iterations).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.errors import ConfigError

OVERSAMPLING = 16
"""Columns of a sketch beyond the rank that is asked for."""
POWER_ITERATIONS = 3
"""Passes over the matrix that sharpen a sketch. Measured on singular values that fall as slowly as `i^-0.3` (sides 1024
to 4096, rank 64): two leave the error 0.3 to 0.4 % above the best, three 0.1 to 0.2 %; on `i^-1` three leave 0.07 %."""
RANDOMISED_ABOVE = 8
"""The sketch is used when the smaller side is at least so many times the sketch's width. Measured on one core: at 2048
x 2048 and rank 64 the exact way takes 1.7 s, the sketch 0.4 s; below this ratio the gain is gone."""

_FIRST_GUESS = 48
_BLOCK_ELEMENTS = 1 << 22
"""Elements widened to float64 at a time: 32 MiB."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """An approximation `left @ right`, with the singular values shared out evenly between both."""

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank columns"]
    energy: float
    """Share of the squared Frobenius norm that is kept, 0 to 1; 1 for a zero matrix."""
    relative_error: float
    """Frobenius norm of what is lost over that of the whole; 0 for a zero matrix."""
    norm: float
    """Frobenius norm of the whole."""

    @property
    def rank(self) -> int:
        """Number of columns of `left`."""
        return self.left.shape[1]


def require_target(rank: int | None, energy: float | None) -> None:
    """Raise `ConfigError` unless exactly one of a rank and a share of energy is given, in range.

    Args:
        rank: Most columns to keep, at least 1.
        energy: Share of the squared Frobenius norm to keep, in (0, 1].
    """
    if (rank is None) == (energy is None):
        raise ConfigError(
            "The size of the low-rank output is not clear.",
            expected="either a rank or a share of energy",
            found="neither" if rank is None else f"rank {rank} and energy {energy}",
            fix="give one of --rank and --energy",
        )
    if rank is not None:
        require_in_range("rank", rank, low=1)
    if energy is not None:
        require_in_range("energy", energy, low=0.0, high=1.0, low_open=True)


def kept_rank(values: Float[Tensor, " values"], *, rank: int | None, energy: float | None, total: float) -> int:
    """Return how many singular values to keep.

    Args:
        values: Singular values, falling.
        rank: Most to keep, or None.
        energy: Smallest share of `total` that their squares must reach, or None.
        total: Squared Frobenius norm of the whole matrix.

    Returns:
        The smallest number that reaches `energy`, or `rank`; never more than the values that are not zero.
    """
    # Below this the values of a float32 matrix are rounding errors.
    floor = float(values[0]) * 1e-12 if values.numel() else 0.0
    nonzero = int((values > floor).sum())
    if rank is not None:
        return min(rank, nonzero)
    sums = values.double().square().cumsum(0)
    # A last digit of the sum must not cost a rank: 1.0 is reached where all but rounding is.
    reached = (sums >= (energy if energy is not None else 1.0) * total * (1.0 - 1e-13)).nonzero()
    return min(int(reached[0, 0]) + 1, nonzero) if reached.numel() else nonzero


def recompress(
    left: Float[Tensor, "rows stacked"],
    right: Float[Tensor, "stacked columns"],
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> LowRank:
    """Return the best approximation of `left @ right` of a lower rank, in float32.

    Args:
        left, right: Factors; scales and weights multiplied in.
        rank: Most columns to keep.
        energy: Share of the squared Frobenius norm to keep.

    Raises:
        ConfigError: Not exactly one of `rank` and `energy` is given, or it is out of range.
    """
    require_target(rank, energy)
    left_basis, left_upper = torch.linalg.qr(left.double())
    right_basis, right_upper = torch.linalg.qr(right.double().T)
    small_left, values, small_right = torch.linalg.svd(left_upper @ right_upper.T, full_matrices=False)
    total = float(values.square().sum())
    kept = kept_rank(values, rank=rank, energy=energy, total=total)
    roots = values[:kept].sqrt()
    lost = float(values[kept:].square().sum())
    return LowRank(
        ((left_basis @ small_left[:, :kept]) * roots).float(),
        (roots.unsqueeze(1) * (small_right[:kept] @ right_basis.T)).float(),
        1.0 - lost / total if total else 1.0,
        math.sqrt(lost / total) if total else 0.0,
        math.sqrt(total),
    )


def lowrank(
    matrix: Float[Tensor, "rows columns"],
    *,
    rank: int | None = None,
    energy: float | None = None,
    random: torch.Generator,
) -> LowRank:
    """Return a low-rank approximation of a matrix in the cheaper of the two ways.

    From a sketch where the matrix is large for it (`RANDOMISED_ABOVE`), for a share of energy from a sketch that is
    widened until it reaches the share; everything else exactly.

    Args:
        matrix: The matrix, in any floating-point dtype.
        rank: Most columns to keep.
        energy: Share of the squared Frobenius norm to keep.
        random: Draws the sketch.

    Raises:
        ConfigError: Not exactly one of `rank` and `energy` is given, or it is out of range.
    """
    require_target(rank, energy)
    width = (rank if rank is not None else _FIRST_GUESS) + OVERSAMPLING
    while min(matrix.shape) >= RANDOMISED_ABOVE * width:
        found = randomised_lowrank(matrix, rank=rank, energy=energy, width=width, random=random)
        if found is not None:
            return found
        width *= 2
    return exact_lowrank(matrix, rank=rank, energy=energy)


def exact_lowrank(
    matrix: Float[Tensor, "rows columns"], *, rank: int | None = None, energy: float | None = None
) -> LowRank:
    """Return the best approximation of a matrix, in float32, from the Gram matrix of its smaller side.

    Args:
        matrix: The matrix, in any floating-point dtype.
        rank: Most columns to keep.
        energy: Share of the squared Frobenius norm to keep.

    Raises:
        ConfigError: Not exactly one of `rank` and `energy` is given, or it is out of range.
    """
    require_target(rank, energy)
    if matrix.shape[0] < matrix.shape[1]:
        return _turned(exact_lowrank(matrix.T, rank=rank, energy=energy))
    columns = matrix.shape[1]
    products = torch.zeros(columns, columns, dtype=torch.float64)
    for block in _blocks(matrix):
        products.addmm_(block.T, block)
    squares, vectors = torch.linalg.eigh(products)
    values = squares.clamp_min(0.0).flip(0).sqrt()
    total = float(products.diagonal().sum())
    kept = kept_rank(values, rank=rank, energy=energy, total=total)
    return _projected(matrix, vectors.flip(1)[:, :kept], total)


def randomised_lowrank(
    matrix: Float[Tensor, "rows columns"],
    *,
    rank: int | None = None,
    energy: float | None = None,
    width: int | None = None,
    random: torch.Generator,
) -> LowRank | None:
    """Return a nearly best approximation, in float32, from a random sketch; None where it is too narrow for `energy`.

    Args:
        matrix: The matrix, in any floating-point dtype.
        rank: Most columns to keep.
        energy: Share of the squared Frobenius norm to keep.
        width: Columns of the sketch; by default `OVERSAMPLING` more than `rank`.
        random: Draws the sketch.

    Raises:
        ConfigError: Not exactly one of `rank` and `energy` is given, or it is out of range.
    """
    require_target(rank, energy)
    width = min(width or (rank or _FIRST_GUESS) + OVERSAMPLING, *matrix.shape)
    if matrix.shape[0] < matrix.shape[1]:
        found = randomised_lowrank(matrix.T, rank=rank, energy=energy, width=width, random=random)
        return None if found is None else _turned(found)
    columns = matrix.shape[1]
    basis = torch.randn(columns, width, generator=random, dtype=torch.float64)
    for _ in range(POWER_ITERATIONS + 1):
        basis, _ = torch.linalg.qr(basis)
        following = torch.zeros(columns, width, dtype=torch.float64)
        for block in _blocks(matrix):
            following.addmm_(block.T, block @ basis)
        basis = following
    basis, _ = torch.linalg.qr(basis)
    # The Gram matrix of the projection gives its singular values and, of the sketch, the best directions.
    products = torch.zeros(width, width, dtype=torch.float64)
    total = 0.0
    for block in _blocks(matrix):
        image = block @ basis
        products.addmm_(image.T, image)
        total += float(block.square().sum())
    squares, vectors = torch.linalg.eigh(products)
    if energy is not None and float(products.diagonal().sum()) < energy * total:
        return None
    kept = kept_rank(squares.clamp_min(0.0).flip(0).sqrt(), rank=rank, energy=energy, total=total)
    return _projected(matrix, basis @ vectors.flip(1)[:, :kept], total)


def _projected(matrix: Tensor, directions: Tensor, total: float) -> LowRank:
    """Return the projection of the rows on orthonormal directions (its columns), with its measured error."""
    # Rows are projected and the error summed in one pass: both are needed for each block.
    images = [block @ directions for block in _blocks(matrix)]
    image = torch.cat(images) if images else torch.zeros(0, directions.shape[1], dtype=torch.float64)
    roots = image.square().sum(dim=0).sqrt().sqrt()
    scale = torch.where(roots > 0.0, roots, 1.0)
    left, right = (image / scale).float(), (directions * scale).T.float()
    lost, row = 0.0, 0
    for block in _blocks(matrix):
        # With the factors as they are stored: their rounding counts.
        lost += float((block - left[row : row + block.shape[0]].double() @ right.double()).square().sum())
        row += block.shape[0]
    return LowRank(
        left.contiguous(),
        right.contiguous(),
        max(0.0, 1.0 - lost / total) if total else 1.0,
        math.sqrt(lost / total) if total else 0.0,
        math.sqrt(total),
    )


def _turned(one: LowRank) -> LowRank:
    return LowRank(one.right.T.contiguous(), one.left.T.contiguous(), one.energy, one.relative_error, one.norm)


def _blocks(matrix: Tensor) -> Iterator[Tensor]:
    """Yield runs of rows in float64, one at a time."""
    height = max(1, _BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], height):
        yield matrix[start : start + height].double()
