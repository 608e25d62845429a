# SPDX-License-Identifier: Apache-2.0
"""RAM: add what only one model changed in full, and average what several changed.

For joining fine-tunes by reinforcement learning, which change few weights each: a plain mean would shrink the changes
that only one of them made.

Source:
    Yuan, Shi, Zhang, Liu, Yao, Vosoughi, Lee: Behavior Knowledge Merge in Reinforced Agentic Models (RAM),
    arXiv 2601.13572.

Equation:
    `a_i = [|d_i| > epsilon]`, `n = sum_i a_i`, `theta = theta_0 + sum_i a_i d_i / max(n, 1)`, `d_i = theta_i - theta_0`

    | symbol | name |
    |---|---|
    | theta_0 | `aligned`, the base of the task vectors |
    | theta_i | `tuned`, `tuned_2`, ... |
    | epsilon | `epsilon`, changes up to this size count as none |

Differs from the official code:
    Not compared with it; written from a description of the method, the paper's own constants were not verified.

Cost:
    No passes over data; one read of each checkpoint and one write.

Limits:
    No strength, so `heal` does not search it: one tuned model alone comes back but for its smallest changes. The
    threshold is in weight units and has to suit the precision of the checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace
from keelwright.ops.per_model import require_models
from keelwright.ops.task_vectors import add_disjoint_and_mean
from keelwright.weights.edit import Edit, model_roles, tuned_roles
from keelwright.weights.task_vectors import ALIGNED


@dataclass(frozen=True, slots=True)
class RamConfig:
    """Settings of RAM."""

    epsilon: float = 1e-5
    """Changes up to this size count as none, weight units, 0 or more."""

    def __post_init__(self) -> None:
        require_in_range("epsilon", self.epsilon, low=0.0, high=math.inf)


def ram(
    base: Float[Tensor, "*shape"], tuned: Sequence[Float[Tensor, "*shape"]], config: RamConfig
) -> Float[Tensor, "*shape"]:
    """Return the merge of tensors in memory or of a chunk of them.

    Args:
        base: Weights of the common parent, float32 or float64.
        tuned: Weights of each tuned model, in the same dtype.
        config: The threshold.
    """
    deltas = [one - base for one in tuned]
    return add_disjoint_and_mean(base, deltas, epsilon=config.epsilon, factors=[1.0] * len(deltas))


@dataclass(frozen=True, slots=True)
class Ram(Edit):
    """RAM as a weight edit."""

    config: RamConfig = RamConfig()
    models: int = 2

    config_class: ClassVar[type[RamConfig]] = RamConfig
    search_space: ClassVar[SearchSpace | None] = None
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        require_models("ram", self.models, least=self.min_models, most=self.max_models)

    def roles(self) -> tuple[str, ...]:
        """Return the base and the tuned models, the first of which lays out the output."""
        return (ALIGNED, *tuned_roles(self.models))

    def reach(self, name: str) -> Reach:
        """Return COPY for a single model of which every change counts, else POINTWISE."""
        return Reach.COPY if self.models == 1 and self.config.epsilon == 0.0 else Reach.POINTWISE

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the merged weights of the chunk."""
        return ram(chunk.tensors[ALIGNED], [chunk.tensors[role] for role in model_roles(self.models)], self.config)
