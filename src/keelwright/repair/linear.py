# SPDX-License-Identifier: Apache-2.0
"""Linear interpolation between a model before tuning and the same model after it; weighted averages of several models.

The first thing to try when tuning on ordinary data lost some refusals and the model from before is at hand (with
LoRA it always is: it is the base). No data, no training, no forward pass. With `weight` the same sum over any number
of models: a model soup.

Source:
    Farn, Su, Kumar, Sahay, Chen, Lee: Safeguard Fine-Tuned LLMs Through Pre- and Post-Tuning Model Merging,
    arXiv 2412.19512, Findings of EMNLP 2025; the linear variant. Official evaluation code: FarnHua/Safety_Eval.
    Averages of several models: Wortsman et al.: Model soups, arXiv 2203.05482.

Equation:
    `theta = (1 - lambda) theta_base + lambda theta_t`

    With weights: `theta = sum_i w_i x_i / sum_i w_i`; without `normalize` the sum alone.

    | symbol | name |
    |---|---|
    | theta_base | `aligned` |
    | theta_t | `tuned` |
    | lambda | `coefficient`, the weight of the tuned model |
    | x_i | `aligned` where it takes part (`based`), then `tuned`, `tuned_2`, ... |
    | w_i | `weight`, in that order |

Differs from the official code:
    The official code calls a merging program; the arithmetic is the same. Entries that both models share stay
    exactly as they are, where float32 arithmetic alone could move them by one unit in the last place.

Cost:
    No passes; one read of each model and one write, a few MB of memory. LoRA adapters on the aligned model come out
    as an adapter: one alone as itself with its second factor scaled, several stacked.

Limits:
    Needs the true parent of the tuned model. Never safer than the parent, and shrinks what tuning taught together
    with what it broke. Several models must share a parent, or their average is no model at all.
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
from keelwright.ops.affine import sum_from_base
from keelwright.ops.combine import weighted_sum
from keelwright.ops.per_model import normalized, one_per_model, require_models, require_numbers
from keelwright.weights.edit import Edit, model_roles, tuned_roles


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """Settings of linear interpolation between an aligned and a tuned model, and of averages of several models."""

    coefficient: float = 0.6
    """Weight of the tuned model, 0 to 1. 0 returns the aligned model, 1 the tuned model, each byte for byte. Not read
    where there are `weight`. Source: arXiv 2412.19512, best region 0.5 to 0.6."""

    weight: float | tuple[float, ...] | None = None
    """Weight of each model in the order given, the aligned one first where it takes part; a single number counts for
    all. Any finite numbers. None: two models and `coefficient`."""

    normalize: bool = True
    """Divide `weight` by their sum."""

    def __post_init__(self) -> None:
        require_in_range("coefficient", self.coefficient, low=0.0, high=1.0)
        if self.weight is not None:
            require_numbers("weight", self.weight)


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
    pair = (aligned.to(wide), tuned.to(wide))
    return weighted_sum(pair, (1.0 - coefficient, coefficient), keep_equal=True).to(tuned.dtype)


@dataclass(frozen=True, slots=True)
class Linear(Edit):
    """Linear interpolation, or a weighted average, as a weight edit."""

    config: LinearConfig = LinearConfig()
    models: int = 1
    """Number of tuned models."""
    based: bool = True
    """Whether the aligned model takes part; with `weight` it has the first of them."""

    config_class: ClassVar[type[LinearConfig]] = LinearConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=1.0, grid=(0.2, 0.4, 0.6, 0.8))
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        require_models("linear", self.models, least=self.min_models)
        if self.config.weight is None and (self.models, self.based) != (1, True):
            raise ConfigError(
                "'linear' needs a weight for each model.",
                expected="'weight', or an aligned and a single tuned model with a 'coefficient'",
                found=f"{self.models} tuned, {'an' if self.based else 'no'} aligned model and no 'weight'",
                fix="set 'weight': one per model, or one number for all",
            )
        self.combination()

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return (*(("aligned",) if self.based else ()), *tuned_roles(self.models))

    def reach(self, name: str) -> Reach:
        """Return COPY where one model has all the weight, else POINTWISE."""
        return Reach.COPY if self._alone() else Reach.POINTWISE

    def copies(self, name: str) -> str:
        """Return the role that has all the weight."""
        return self._alone() or self.roles()[-1]

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the interpolated weights of the chunk."""
        if self.config.weight is None:
            return linear(chunk.tensors["aligned"], chunk.tensors["tuned"], coefficient=self.config.coefficient)
        weights = self.combination()
        return sum_from_base([chunk.tensors[role] for role in weights], list(weights.values()))

    def combination(self) -> Mapping[str, float]:
        """Return the weight of each role; the edit is their sum."""
        if self.config.weight is None:
            return {"aligned": 1.0 - self.config.coefficient, "tuned": self.config.coefficient}
        order = (*(("aligned",) if self.based else ()), *model_roles(self.models))
        weights = one_per_model("weight", self.config.weight, len(order))
        if self.config.normalize:
            weights = normalized("weight", weights)
        return dict(zip(order, weights, strict=True))

    def _alone(self) -> str | None:
        """Return the role with weight 1 where all others have 0."""
        taking_part = {role: weight for role, weight in self.combination().items() if weight != 0.0}
        return next(iter(taking_part)) if list(taking_part.values()) == [1.0] else None
