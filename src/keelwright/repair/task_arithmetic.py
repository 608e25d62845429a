# SPDX-License-Identifier: Apache-2.0
"""Task arithmetic: add weighted task vectors, each a tuned model minus their common base, to the base.

For joining what several fine-tunes of one model learned, or for shrinking (coefficient below 1) or negating (negative
weight) what one of them learned. With one model and weight 1 it is linear interpolation between base and tuned model.

Source:
    Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi: Editing Models with Task Arithmetic,
    arXiv 2212.04089, ICLR 2023.

Equation:
    `theta = theta_0 + lambda sum_i w_i tau_i`, with `tau_i = theta_i - theta_0`

    | symbol | name |
    |---|---|
    | theta_0 | `aligned`, the base of the task vectors |
    | theta_i | `tuned`, `tuned_2`, ... |
    | lambda | `coefficient` |
    | w_i | `weight` |

Differs from the official code:
    None known in the arithmetic. `normalize` (divide the sum by the sum of the weights) is an option of merging
    programs, not of the paper.

Cost:
    No passes over data; one read of each checkpoint and one write.

Limits:
    The base must be the true parent of every tuned model. Vectors of models that learned opposite things cancel;
    `ties` is for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from keelwright.core.protocols import Chunk, Found, SearchSpace
from keelwright.ops.per_model import one_per_model
from keelwright.ops.task_vectors import add_merged
from keelwright.weights.edit import Edit, model_roles
from keelwright.weights.task_vectors import (
    ALIGNED,
    PerModel,
    TaskVectors,
    require_task_vector_settings,
)

_NO_WEIGHT = 1e-8


@dataclass(frozen=True, slots=True)
class TaskArithmeticConfig:
    """Settings of task arithmetic."""

    coefficient: float = 1.0
    """Strength lambda of the sum of task vectors, any finite number. 0 returns the aligned model byte for byte; 1 with
    one model of weight 1 the tuned one. The paper picks it on held-out data."""

    weight: PerModel = 1.0
    """Weight of each task vector, one number or one per tuned model; negative ones forget."""

    normalize: bool = False
    """Divide the sum by the sum of the weights (a sum below 1e-8 counts as 1)."""

    def __post_init__(self) -> None:
        require_task_vector_settings(coefficient=self.coefficient, weight=self.weight, normalize=self.normalize)


def task_arithmetic(
    base: Float[Tensor, "*shape"], tuned: Sequence[Float[Tensor, "*shape"]], config: TaskArithmeticConfig
) -> Float[Tensor, "*shape"]:
    """Return the base plus the weighted task vectors.

    Args:
        base: Weights of the common parent, float32 or float64.
        tuned: Weights of each tuned model, in the same dtype.
        config: Strength and weights.
    """
    weights = one_per_model("weight", config.weight, len(tuned))
    vectors = [(one - base).mul_(weight) for one, weight in zip(tuned, weights, strict=True)]
    return add_merged(base, vectors, weights, coefficient=config.coefficient, normalize=config.normalize)


@dataclass(frozen=True, slots=True)
class TaskArithmetic(TaskVectors, Edit):
    """Task arithmetic as a weight edit."""

    config: TaskArithmeticConfig = TaskArithmeticConfig()
    models: int = 1

    config_class: ClassVar[type[TaskArithmeticConfig]] = TaskArithmeticConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=1.0, grid=(0.2, 0.4, 0.6, 0.8))
    equivalent_to: ClassVar[str] = "linear"
    """With one tuned model it computes the same thing."""

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the merged weights of the chunk."""
        tuned = [chunk.tensors[role] for role in model_roles(self.models)]
        return task_arithmetic(chunk.tensors[ALIGNED], tuned, self.config)

    def combination(self) -> Mapping[str, float]:
        """Return the weight of each role; the edit is their sum."""
        weights = self.weights()
        total = sum(weights) if self.config.normalize else 1.0
        scale = self.config.coefficient / (total if abs(total) >= _NO_WEIGHT else 1.0)
        shares = {role: scale * weight for role, weight in zip(model_roles(self.models), weights, strict=True)}
        return {ALIGNED: 1.0 - sum(shares.values()), **shares}
