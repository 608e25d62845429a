# SPDX-License-Identifier: Apache-2.0
"""Low-rank approximations: the best there is, measured against the plain singular value decomposition."""

from __future__ import annotations

import math

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.ops import lowrank as module
from keelwright.ops.lowrank import (
    LowRank,
    exact_lowrank,
    kept_rank,
    lowrank,
    randomised_lowrank,
    recompress,
    require_target,
)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectrum(rows: int, columns: int, power: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a float32 matrix with singular values `i^-power`, and these."""
    size = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, size, generator=random(seed), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, size, generator=random(seed + 1), dtype=torch.float64))
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -power
    return ((left * values) @ right.T).float(), values


def best_error(values: torch.Tensor, rank: int) -> float:
    return math.sqrt(float(values[rank:].square().sum() / values.square().sum()))


def measured_error(matrix: torch.Tensor, one: LowRank) -> float:
    return float((matrix.double() - one.left.double() @ one.right.double()).norm() / matrix.double().norm())


@pytest.mark.parametrize("shape", [(40, 40), (70, 20), (20, 70)])
@pytest.mark.parametrize("rank", [1, 5, 19])
def test_the_exact_way_is_the_best_approximation(shape: tuple[int, int], rank: int) -> None:
    matrix, values = spectrum(*shape, power=0.7)
    one = exact_lowrank(matrix, rank=rank)
    assert one.rank == rank
    assert (one.left.shape[0], one.right.shape[1]) == shape
    assert one.relative_error == pytest.approx(best_error(values, rank), rel=1e-5)
    assert one.relative_error == pytest.approx(measured_error(matrix, one), rel=1e-9)
    assert one.energy == pytest.approx(1.0 - one.relative_error**2, abs=1e-12)
    assert one.norm == pytest.approx(float(matrix.double().norm()))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
@pytest.mark.parametrize("asked", [6, 12, 30])
def test_a_rank_that_covers_the_true_one_gives_the_matrix_itself(shape: tuple[int, int], asked: int) -> None:
    rows, columns = shape
    matrix = torch.randn(rows, 6, generator=random()) @ torch.randn(6, columns, generator=random(1))
    one = exact_lowrank(matrix, rank=asked)
    torch.testing.assert_close(one.left @ one.right, matrix, rtol=0, atol=1e-5)
    assert one.relative_error < 1e-6
    sketched = randomised_lowrank(matrix, rank=asked, random=random(2))
    assert sketched is not None
    assert sketched.relative_error < 1e-6


@pytest.mark.parametrize("power", [0.3, 1.0])
@pytest.mark.parametrize("shape", [(300, 260), (260, 300)])
@pytest.mark.parametrize("seed", range(3))
def test_the_sketch_is_within_a_percent_of_the_best(shape: tuple[int, int], power: float, seed: int) -> None:
    matrix, values = spectrum(*shape, power=power)
    one = randomised_lowrank(matrix, rank=16, random=random(seed))
    assert one is not None
    best = best_error(values, 16)
    assert best * (1 - 1e-5) <= one.relative_error <= best * 1.01
    assert one.relative_error == pytest.approx(measured_error(matrix, one), rel=1e-9)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 0.999])
def test_energy_takes_the_fewest_ranks_that_reach_it(energy: float) -> None:
    matrix, values = spectrum(60, 40, power=0.8)
    one = exact_lowrank(matrix, energy=energy)
    assert one.energy >= energy - 1e-7
    shares = values.square().cumsum(0) / values.square().sum()
    assert one.rank == int((shares < energy).sum()) + 1


def test_more_rank_never_keeps_less_energy() -> None:
    matrix, _ = spectrum(50, 30, power=0.5)
    for way in (exact_lowrank, lambda one, rank: recompress(one, torch.eye(30), rank=rank)):
        kept = [way(matrix, rank=rank).energy for rank in range(1, 31)]
        assert kept == sorted(kept)
        assert kept[-1] == pytest.approx(1.0, abs=1e-9)


def test_all_energy_gives_the_true_rank() -> None:
    matrix = torch.randn(40, 3, generator=random()) @ torch.randn(3, 25, generator=random(1))
    product = recompress(matrix, torch.eye(25), energy=1.0)
    assert product.rank <= 25
    torch.testing.assert_close(product.left @ product.right, matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_recompressing_equals_the_decomposition_of_the_product(rank: int) -> None:
    left, right = torch.randn(50, 9, generator=random()), torch.randn(9, 30, generator=random(1))
    one, whole = recompress(left, right, rank=rank), exact_lowrank(left @ right, rank=rank)
    torch.testing.assert_close(one.left @ one.right, whole.left @ whole.right, rtol=0, atol=1e-4)
    assert one.relative_error == pytest.approx(whole.relative_error, abs=1e-5)
    assert one.norm == pytest.approx(float((left.double() @ right.double()).norm()))


def test_recompressing_with_stacked_copies_finds_the_true_rank() -> None:
    left, right = torch.randn(20, 4, generator=random()), torch.randn(4, 30, generator=random(1))
    one = recompress(torch.cat([left, 2 * left], dim=1), torch.cat([right, right]), energy=1.0 - 1e-12)
    assert one.rank == 4
    torch.testing.assert_close(one.left @ one.right, 3 * left @ right, rtol=0, atol=1e-4)


def test_more_stacked_ranks_than_rows_are_fine() -> None:
    left, right = torch.randn(5, 12, generator=random()), torch.randn(12, 7, generator=random(1))
    one = recompress(left, right, rank=12)
    assert one.rank == 5
    torch.testing.assert_close(one.left @ one.right, left @ right, rtol=0, atol=1e-5)


def test_nothing_is_kept_of_zero() -> None:
    for one in (exact_lowrank(torch.zeros(4, 3), rank=2), recompress(torch.zeros(4, 2), torch.zeros(2, 3), energy=0.5)):
        assert (one.rank, one.energy, one.relative_error, one.norm) == (0, 1.0, 0.0, 0.0)


def test_large_matrices_are_sketched_and_small_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, _ = spectrum(160, 160, power=1.0)
    called = []

    def spied(matrix: torch.Tensor, *, rank: int | None, energy: float | None) -> LowRank:
        called.append((rank, energy))
        return exact_lowrank(matrix, rank=rank, energy=energy)

    monkeypatch.setattr(module, "exact_lowrank", spied)
    assert lowrank(matrix, rank=4, random=random()) is not None
    assert not called
    lowrank(matrix, rank=40, random=random())
    assert called == [(40, None)]


def test_the_sketch_is_widened_until_it_reaches_the_energy() -> None:
    matrix, values = spectrum(1100, 1100, power=0.55)
    shares = values.square().cumsum(0) / values.square().sum()
    energy = float(shares[90])
    one = lowrank(matrix, energy=energy, random=random())
    assert one.energy >= energy - 1e-6
    assert 91 <= one.rank <= 94
    assert randomised_lowrank(matrix, energy=energy, width=64, random=random()) is None


def test_the_same_seed_gives_the_same_bits() -> None:
    matrix, _ = spectrum(200, 180, power=0.5)
    one, two = (randomised_lowrank(matrix, rank=8, random=random(5)) for _ in range(2))
    assert one is not None and two is not None
    assert torch.equal(one.left, two.left) and torch.equal(one.right, two.right)


def test_blocks_of_rows_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, _ = spectrum(90, 60, power=0.5)
    whole = exact_lowrank(matrix, rank=7)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 60 * 13)
    parts = exact_lowrank(matrix, rank=7)
    torch.testing.assert_close(parts.left @ parts.right, whole.left @ whole.right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_widened_first(dtype: torch.dtype) -> None:
    matrix = spectrum(30, 20, power=0.5)[0].to(dtype)
    one = exact_lowrank(matrix, rank=20)
    assert one.left.dtype == torch.float32
    torch.testing.assert_close(one.left @ one.right, matrix.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rank", "energy", "found"),
    [(None, None, "neither"), (3, 0.5, "rank 3 and energy 0.5"), (0, None, "0"), (None, 0.0, "0"), (None, 1.5, "1.5")],
)
def test_the_target_is_one_number_in_range(rank: int | None, energy: float | None, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_target(rank, energy)
    assert caught.value.found == found


def test_kept_rank_counts_the_values_that_are_not_zero() -> None:
    values = torch.tensor([2.0, 1.0, 1e-13], dtype=torch.float64)
    assert kept_rank(values, rank=3, energy=None, total=5.0) == 2
    assert kept_rank(values, rank=None, energy=0.8, total=5.0) == 1
    assert kept_rank(values, rank=None, energy=0.81, total=5.0) == 2
