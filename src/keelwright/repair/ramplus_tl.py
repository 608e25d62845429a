# SPDX-License-Identifier: Apache-2.0
"""RAM+ per tensor: as RAM, and what only one model changed is enlarged by how much that model shares with others.

For joining fine-tunes by reinforcement learning: a model whose shared changes are averaged away gets a little more of
its own ones.

Source:
    Yuan, Shi, Zhang, Liu, Yao, Vosoughi, Lee: Behavior Knowledge Merge in Reinforced Agentic Models (RAM+),
    arXiv 2601.13572.

Equation:
    `a_i = [|d_i| > epsilon]`, `n = sum_i a_i`, `d_i = theta_i - theta_0`, `rho_i = #(a_i, n > 1) / #(a_i, n = 1)`,
    `lambda_i = 1 + r clip(rho_i, 0, alpha)`; `theta = theta_0 + lambda_i d_i` where only model i changed an entry, and
    the mean of the changes on top where several did

    | symbol | name |
    |---|---|
    | theta_0 | `aligned`, the base of the task vectors |
    | theta_i | `tuned`, `tuned_2`, ... |
    | epsilon | `epsilon`, changes up to this size count as none |
    | r | `r` |
    | alpha | `alpha` |

Differs from the official code:
    Reconstruction: written from a description of the method; the gap is the paper's constants, which were not verified
    (the defaults are a merging program's). The paper counts over the whole model (`scope: model`), merging programs
    over each tensor (the default). A model with shared but no own entries gets alpha, one with neither gets 0.

Cost:
    No passes over data; two reads of each tensor and one write.

Limits:
    No strength, so `heal` does not search it: one tuned model alone comes back but for its smallest changes. With the
    defaults the factor is at most 1.02.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace, Stats, TensorEntry, WeightEdit
from keelwright.ops.per_model import require_models
from keelwright.ops.task_vectors import add_disjoint_and_mean, support_counts
from keelwright.weights.edit import Edit, model_roles, tuned_roles
from keelwright.weights.task_vectors import ALIGNED


@dataclass(frozen=True, slots=True)
class RamplusTlConfig:
    """Settings of RAM+ per tensor."""

    epsilon: float = 1e-5
    """Changes up to this size count as none, weight units, 0 or more."""

    r: float = 0.1
    """How much the share of common entries enlarges the own ones, 0 or more."""

    alpha: float = 0.2
    """Largest ratio of common to own entries that counts, 0 or more."""

    scope: Literal["tensor", "model"] = "tensor"
    """Count entries in each tensor, or in the whole model (the paper)."""

    def __post_init__(self) -> None:
        require_in_range("epsilon", self.epsilon, low=0.0, high=math.inf)
        require_in_range("r", self.r, low=0.0, high=math.inf, high_open=True)
        require_in_range("alpha", self.alpha, low=0.0, high=math.inf, high_open=True)
        require_choice("scope", self.scope, ("tensor", "model"))


def overlap(deltas: Sequence[Float[Tensor, "*shape"]], *, epsilon: float) -> list[tuple[int, int]]:
    """Return for each task vector how many entries it changes alone, and how many together with others."""
    supports, counts = support_counts(deltas, epsilon=epsilon)
    is_unique = counts == 1
    unique = [int((support & is_unique).sum()) for support in supports]
    return [(alone, int(support.sum()) - alone) for alone, support in zip(unique, supports, strict=True)]


def factor(unique: int, shared: int, config: RamplusTlConfig) -> float:
    """Return what the entries that a model changes alone are multiplied with.

    Args:
        unique: How many there are.
        shared: How many entries the model changes together with others.
        config: The constants.
    """
    if unique == 0:
        return 1.0 + config.r * (config.alpha if shared else 0.0)
    return 1.0 + config.r * min(config.alpha, shared / unique)


def ramplus_tl(
    base: Float[Tensor, "*shape"], tuned: Sequence[Float[Tensor, "*shape"]], config: RamplusTlConfig
) -> Float[Tensor, "*shape"]:
    """Return the merge of tensors in memory, taken as the whole model.

    Args:
        base: Weights of the common parent, float32 or float64.
        tuned: Weights of each tuned model, in the same dtype.
        config: The constants; both scopes are the same here.
    """
    deltas = [one - base for one in tuned]
    factors = [factor(*counts, config) for counts in overlap(deltas, epsilon=config.epsilon)]
    return add_disjoint_and_mean(base, deltas, epsilon=config.epsilon, factors=factors)


@dataclass(frozen=True, slots=True)
class RamplusTl(Edit):
    """RAM+ as a weight edit."""

    config: RamplusTlConfig = RamplusTlConfig()
    models: int = 2
    factors: tuple[float, ...] | None = field(default=None, repr=False, compare=False)
    """Factors of the whole model, once they are known."""

    config_class: ClassVar[type[RamplusTlConfig]] = RamplusTlConfig
    search_space: ClassVar[SearchSpace | None] = None
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        require_models("ramplus_tl", self.models, least=self.min_models, most=self.max_models)

    def roles(self) -> tuple[str, ...]:
        """Return the base and the tuned models, the first of which lays out the output."""
        return (ALIGNED, *tuned_roles(self.models))

    def reach(self, name: str) -> Reach:
        """Return COPY for a single model of which every change counts, POINTWISE where the factors are known."""
        if self.models == 1 and self.config.epsilon == 0.0:
            return Reach.COPY
        return Reach.REDUCED if self.factors is None else Reach.POINTWISE

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return how many entries each model changes alone, and with others."""
        counts = overlap(self._deltas(chunk), epsilon=self.config.epsilon)
        stats = {}
        for role, (unique, shared) in zip(model_roles(self.models), counts, strict=True):
            stats[f"unique {role}"], stats[f"shared {role}"] = unique, shared
        return stats

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """Return the counts, and the factors that they come to."""
        return {"counts": dict(sums), "factors": self._factors(sums)}

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the merged weights of the chunk."""
        factors = self.factors or found["factors"]
        epsilon = self.config.epsilon
        return add_disjoint_and_mean(chunk.tensors[ALIGNED], self._deltas(chunk), epsilon=epsilon, factors=factors)

    def survey(self) -> WeightEdit | None:
        """Return the edit itself where the whole model is to be counted and has not been."""
        is_needed = self.config.scope == "model" and self.reach("") is Reach.REDUCED
        return replace(self, config=replace(self.config, scope="tensor")) if is_needed else None

    def surveyed(self, found: Mapping[str, Found]) -> RamplusTl:
        """Return the edit that knows the factors of the whole model."""
        totals: dict[str, int] = {}
        for one in found.values():
            for key, count in one["counts"].items():
                totals[key] = totals.get(key, 0) + count
        return replace(self, factors=self._factors(totals))

    def shares(self) -> Hashable:
        """Return all settings."""
        return (self.models, self.config) if self.reach("") is Reach.REDUCED else None

    def _factors(self, sums: Stats) -> tuple[float, ...]:
        roles = model_roles(self.models)
        return tuple(factor(sums.get(f"unique {r}", 0), sums.get(f"shared {r}", 0), self.config) for r in roles)

    def _deltas(self, chunk: Chunk) -> list[Tensor]:
        return [chunk.tensors[role] - chunk.tensors[ALIGNED] for role in model_roles(self.models)]
