# SPDX-License-Identifier: Apache-2.0
"""RESTA: add a safety vector, aligned minus un-aligned weights, to the tuned model.

For when safety was lost in tuning, the tuned weights should stay as they are apart from one addition, and linear
interpolation costs too much of the task. The vector belongs to the aligned model, so one serves all its fine-tunes.

Source:
    Bhardwaj, Do, Poria: Language Models are Homer Simpson! Safety Re-Alignment of Fine-tuned Language Models through
    Task Arithmetic, arXiv 2402.11746, ACL 2024. Official code: declare-lab/resta.

Equation:
    `theta_hat = theta_t + gamma (theta_o - theta_u)`

    | symbol | name |
    |---|---|
    | theta_o | `aligned` |
    | theta_u | `unaligned`, the aligned model with its refusals tuned away |
    | theta_t | `tuned` |
    | gamma | `coefficient`, the strength of the safety vector |

Differs from the official code:
    Reconstruction: neither the paper's body nor its code could be read. The gaps are the value of gamma (0.5 is the
    default of an independent re-implementation) and the recipe that makes the un-aligned copy. The addition happens
    in weight space; adding LoRA factor matrices, as some re-implementations do, is another method: `add_factors`.

Cost:
    No passes for the edit itself; three reads and one write of the checkpoint. Making the un-aligned copy is a small
    fine-tune.

Limits:
    Unbounded: a growing coefficient first restores refusals, then refuses ordinary requests, then breaks fluency.
    The un-aligned copy is hazardous and is never written; so is its difference from the aligned model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace
from keelwright.models.adapters import LoraFactors
from keelwright.weights.edit import Edit


@dataclass(frozen=True, slots=True)
class RestaConfig:
    """Settings of RESTA."""

    coefficient: float = 0.5
    """Strength gamma of the safety vector, 0 or more. 0 returns the tuned model byte for byte."""

    def __post_init__(self) -> None:
        require_in_range("coefficient", self.coefficient, low=0.0, high=float("inf"), high_open=True)


def resta(
    aligned: Float[Tensor, "*shape"],
    unaligned: Float[Tensor, "*shape"],
    tuned: Float[Tensor, "*shape"],
    *,
    coefficient: float,
) -> Float[Tensor, "*shape"]:
    """Return `tuned + coefficient * (aligned - unaligned)`, evaluated in float32, in the dtype of `tuned`.

    Args:
        aligned: Weights of the aligned model.
        unaligned: Weights of its un-aligned copy.
        tuned: Weights to repair. With float64 inputs the evaluation is in float64.
        coefficient: Strength of the safety vector; 0 returns `tuned` itself.
    """
    if coefficient == 0.0:
        return tuned
    wide = torch.promote_types(torch.promote_types(aligned.dtype, unaligned.dtype), torch.float32)
    wide = torch.promote_types(wide, tuned.dtype)
    safety_vector = torch.sub(aligned.to(wide), unaligned.to(wide))
    return safety_vector.mul_(coefficient).add_(tuned.to(wide)).to(tuned.dtype)


def add_factors(tuned: LoraFactors, safety: LoraFactors, *, coefficient: float) -> LoraFactors:
    """Return `A_t + gamma A_s` and `B_t + gamma B_s`: adapters added factor by factor, which is not RESTA.

    It is here for comparison with code that does so. The product holds cross terms, `gamma (B_t A_s + B_s A_t)`, that
    belong to neither adapter; where both share A, what is added to the base is `1 + gamma` times that of RESTA.

    Args:
        tuned: The tuned model's adapter.
        safety: The safe adapter, whose product stands for the safety vector; of the same rank and scale.
        coefficient: gamma.

    Raises:
        ConfigError: Rank, shape or scale differ.
    """
    one, other = ((x.left.shape, x.right.shape, x.scale) for x in (tuned, safety))
    if one != other:
        raise ConfigError(
            "Factors can only be added where both adapters have the same rank, shape and scale.",
            expected=f"factors {tuple(one[0])} and {tuple(one[1])} with scale {one[2]:g}",
            found=f"factors {tuple(other[0])} and {tuple(other[1])} with scale {other[2]:g}",
            fix="add weights instead: the edit does",
        )
    left, right = (
        getattr(tuned, side).float() + coefficient * getattr(safety, side).float() for side in ("left", "right")
    )
    return LoraFactors(left, right, tuned.scale)


@dataclass(frozen=True, slots=True)
class Resta(Edit):
    """RESTA as a weight edit."""

    config: RestaConfig = RestaConfig()

    config_class: ClassVar[type[RestaConfig]] = RestaConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=0.0, grid=(0.25, 0.5, 1.0))

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return ("aligned", "unaligned", "tuned")

    def reach(self, name: str) -> Reach:
        """Return COPY at coefficient 0, else POINTWISE."""
        return Reach.COPY if self.config.coefficient == 0.0 else Reach.POINTWISE

    def copies(self, name: str) -> str:
        """Return the tuned model: without a safety vector nothing changes."""
        return "tuned"

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the repaired weights of the chunk."""
        tensors = chunk.tensors
        return resta(tensors["aligned"], tensors["unaligned"], tensors["tuned"], coefficient=self.config.coefficient)

    def combination(self) -> Mapping[str, float]:
        """Return the weight of each role; the edit is their sum."""
        strength = self.config.coefficient
        return {"aligned": strength, "unaligned": -strength, "tuned": 1.0}
