# SPDX-License-Identifier: Apache-2.0
"""LoX: extrapolate the low-rank part of what alignment changed.

Two uses. On the tuned model (the default) it gives back alignment along its strongest directions, without an
un-aligned copy. On the aligned model (`target: aligned`, the paper) it hardens the model before anybody tunes it.

Source:
    Perin, Chen, Chen, Hirata, Wang, Hong: LoX: Low-Rank Extrapolation Robustifies LLM Safety Against Fine-tuning,
    arXiv 2506.15606, COLM 2025. Official code: VITA-Group/LoX.

Equation:
    `D = W_a - W_b`, `W = W_target + alpha D_k`, `D_k` the best approximation of D of rank k

    | symbol | name |
    |---|---|
    | W_b | `base`, the model before alignment |
    | W_a | `aligned` |
    | W_target | `tuned` (ours) or `aligned` (the paper), by `target` |
    | alpha | `coefficient` |
    | k | `rank`; 0: as many as `energy` needs; both 0 and 1: all of D |

Differs from the official code:
    With `target: aligned`, equal to it (commit 9213ce6, run in float32) within 5e-7 on a small model; the code itself
    works in bfloat16, and so rounds D. D is added to the tuned model by default; with the aligned model in the role
    `tuned`, or `target: aligned`, it is the paper's. The coefficient's default is about that of the paper, which was
    not read; the code's is 1.0. The code decomposes every matrix in full; here the eigenvectors of the shorter side's
    Gram matrix, or a random sketch.

Cost:
    No passes; three reads and one write of the checkpoint, one eigenvalue problem of each matrix's shorter side in
    float64 (`sketch`: products with `rank + 8` vectors). Memory: the largest matrix, a few times.

Limits:
    Needs the base model. D holds instruction following as well as safety: a large coefficient distorts both. Vectors
    and tensors of three and more dimensions stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace
from keelwright.ops.projection import leading_directions, project, sketched_directions
from keelwright.weights.edit import Edit

Target = Literal["tuned", "aligned"]
Solver = Literal["exact", "sketch"]


@dataclass(frozen=True, slots=True)
class LoxConfig:
    """Settings of LoX."""

    coefficient: float = 1.25
    """Strength alpha, 0 or more; 0 returns the target byte for byte. The paper: about 1.25; the code: 1.0."""
    rank: int = 0
    """Rank k of the extrapolated part, 0 or more; 0 leaves it to `energy`."""
    energy: float = 1.0
    """Where `rank` is 0: share of ||D||_F^2 that the part holds, above 0 to 1. 1 is all of D, the released k = 0."""
    target: Target = "tuned"
    """What it is added to: `tuned` (ours, a repair) or `aligned` (the paper, hardening)."""
    solver: Solver = "exact"
    """`exact`: Gram matrix in float64; `sketch`: randomised, for large matrices and a small `rank`."""
    seed: int = 0
    """Of the sketch."""

    def __post_init__(self) -> None:
        require_in_range("coefficient", self.coefficient, low=0.0, high=float("inf"), high_open=True)
        require_in_range("rank", self.rank, low=0)
        require_in_range("energy", self.energy, low=0.0, low_open=True, high=1.0)
        require_choice("target", self.target, ("tuned", "aligned"))
        require_choice("solver", self.solver, ("exact", "sketch"))
        if self.solver == "sketch" and self.rank == 0:
            raise ConfigError(
                "A sketch needs to know how many directions it looks for.",
                expected="'rank' of at least 1 with solver sketch",
                found="rank 0",
                fix="set 'rank', or use solver exact",
            )


def low_rank_part(
    difference: Float[Tensor, "rows columns"],
    *,
    rank: int = 0,
    energy: float = 1.0,
    solver: Solver = "exact",
    seed: int = 0,
) -> Float[Tensor, "rows columns"]:
    """Return the best approximation of a matrix of the given rank, in its dtype; the matrix itself where that is all.

    Args:
        difference: D.
        rank: k; 0 leaves it to `energy`.
        energy: Share of the squared norm to keep where `rank` is 0.
        solver: How the directions are found.
        seed: Of the sketch.
    """
    if rank >= min(difference.shape) or (rank == 0 and energy == 1.0):
        return difference
    if solver == "sketch":
        return project(sketched_directions(difference, rank=rank, seed=seed), difference)
    return project(leading_directions(difference, rank=rank or None, energy=energy, side="shorter"), difference)


def lox(
    base: Float[Tensor, "rows columns"],
    aligned: Float[Tensor, "rows columns"],
    target: Float[Tensor, "rows columns"],
    *,
    coefficient: float,
    rank: int = 0,
    energy: float = 1.0,
    solver: Solver = "exact",
    seed: int = 0,
) -> Float[Tensor, "rows columns"]:
    """Return `target + coefficient * D_k` with `D = aligned - base`; `target` itself at coefficient 0.

    Args:
        base, aligned: The matrix before and after alignment, float32 or float64.
        target: What is added to: the tuned matrix, or `aligned` again.
        coefficient: Strength.
        rank, energy, solver, seed: As for `low_rank_part`.
    """
    if coefficient == 0.0:
        return target
    part = low_rank_part(aligned - base, rank=rank, energy=energy, solver=solver, seed=seed)
    return target + coefficient * part


@dataclass(frozen=True, slots=True)
class Lox(Edit):
    """LoX as a weight edit."""

    config: LoxConfig = LoxConfig()

    config_class: ClassVar[type[LoxConfig]] = LoxConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=0.0, grid=(0.25, 0.5, 1.0, 1.25))

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return ("base", "aligned") if self.config.target == "aligned" else ("base", "aligned", "tuned")

    def reach(self, name: str) -> Reach:
        """Return COPY at coefficient 0, else MATRIX."""
        return Reach.COPY if self.config.coefficient == 0.0 else Reach.MATRIX

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the matrix with the low-rank part added; other tensors as they are."""
        tensors, config = chunk.tensors, self.config
        target = tensors[config.target]
        if len(chunk.entry.shape) != 2:
            return target
        return lox(
            tensors["base"],
            tensors["aligned"],
            target,
            coefficient=config.coefficient,
            rank=config.rank,
            energy=config.energy,
            solver=config.solver,
            seed=config.seed,
        )
