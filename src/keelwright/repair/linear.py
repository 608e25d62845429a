# SPDX-License-Identifier: Apache-2.0
"""Linear interpolation between a model before tuning and the same model after it.

The first thing to try when tuning on ordinary data lost some refusals and the model from before is at hand (with
LoRA it always is: it is the base). No data, no training, no forward pass.

Source:
    Farn, Su, Kumar, Sahay, Chen, Lee: Safeguard Fine-Tuned LLMs Through Pre- and Post-Tuning Model Merging,
    arXiv 2412.19512, Findings of EMNLP 2025; the linear variant. Official evaluation code: FarnHua/Safety_Eval.

Equation:
    `theta = (1 - lambda) theta_base + lambda theta_t`

    | symbol | name |
    |---|---|
    | theta_base | `aligned` |
    | theta_t | `tuned` |
    | lambda | `coefficient`, the weight of the tuned model |

Differs from the official code:
    The official code calls a merging program; the arithmetic is the same. Entries that both models share stay
    exactly as they are, where float32 arithmetic alone could move them by one unit in the last place.

Cost:
    No passes; two reads and one write of the checkpoint, a few MB of memory. A LoRA adapter on the aligned model
    comes out as the same adapter with its second factor scaled.

Limits:
    Needs the true parent of the tuned model. Never safer than the parent, and shrinks what tuning taught together
    with what it broke.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.protocols import Chunk, Reach, SearchSpace, Stats


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """Settings of linear interpolation between an aligned and a tuned model."""

    coefficient: float = 0.6
    """Weight of the tuned model, 0 to 1. 0 returns the aligned model, 1 the tuned model, each byte for byte."""

    def __post_init__(self) -> None:
        require_in_range("coefficient", self.coefficient, low=0.0, high=1.0)


def linear(
    aligned: Float[Tensor, "*shape"], tuned: Float[Tensor, "*shape"], *, coefficient: float
) -> Float[Tensor, "*shape"]:
    """Return `(1 - coefficient) * aligned + coefficient * tuned`, evaluated in float32, in the dtype of `tuned`.

    Args:
        aligned: Weights before tuning.
        tuned: Weights after tuning. With float64 inputs the evaluation is in float64.
        coefficient: Weight of `tuned`, 0 to 1; both ends return that input itself.
    """
    if coefficient == 0.0:
        return aligned
    if coefficient == 1.0:
        return tuned
    wide = torch.promote_types(torch.promote_types(aligned.dtype, tuned.dtype), torch.float32)
    before, after = aligned.to(wide), tuned.to(wide)
    mixed = torch.mul(before, 1.0 - coefficient).add_(torch.mul(after, coefficient))
    return torch.where(before == after, after, mixed, out=mixed).to(tuned.dtype)


@dataclass(frozen=True, slots=True)
class Linear:
    """Linear interpolation as a weight edit."""

    config: LinearConfig = LinearConfig()

    config_class: ClassVar[type[LinearConfig]] = LinearConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=1.0, grid=(0.2, 0.4, 0.6, 0.8))

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return ("aligned", "tuned")

    def reach(self, name: str) -> Reach:
        """Return COPY at both ends of the coefficient, else POINTWISE."""
        return Reach.COPY if self.config.coefficient in (0.0, 1.0) else Reach.POINTWISE

    def copies(self, name: str) -> str:
        """Return the role that an end of the coefficient stands for."""
        return "aligned" if self.config.coefficient == 0.0 else "tuned"

    def reduce(self, name: str, chunk: Chunk) -> Stats:
        """Return no statistics: every element stands alone."""
        return {}

    def edit(self, name: str, chunk: Chunk, stats: Stats | None) -> Tensor:
        """Return the interpolated weights of the chunk."""
        return linear(chunk.tensors["aligned"], chunk.tensors["tuned"], coefficient=self.config.coefficient)

    def combination(self) -> Mapping[str, float]:
        """Return the weight of each role; the edit is their sum."""
        return {"aligned": 1.0 - self.config.coefficient, "tuned": self.config.coefficient}
