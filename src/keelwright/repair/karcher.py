# SPDX-License-Identifier: Apache-2.0
"""Karcher mean: the point on the sphere with the least squared arc distance to the directions of all models.

The true mean of several directions, where `multislerp` takes the direction of the mean vector. For several models of
one parent that are far apart.

Source:
    arXiv 2603.04972 (a spherical proxy of the Fisher-Rao mean); merge method `karcher` of mergekit 0.1.5 (facts of its
    documentation).

Equation:
    `u_i = x_i / |x_i|`, `m = argmin_m sum_i a_i arccos(<m, u_i>)^2` on the unit sphere, `out = (sum_i a_i |x_i|) m`
    One step: `theta_i = arccos <m, u_i>`, `T = sum_i a_i theta_i / sin theta_i (u_i - cos theta_i m)`,
    `m <- cos|T| m + sin|T| T / |T|`, until `|T| < tol`

    | symbol | name |
    |---|---|
    | x_i | `tuned`, `tuned_2`, ... |
    | a_i | `weight`, divided by their sum |
    | tol, number of steps | `tol`, `max_iter` |

Differs from the official code:
    Reconstruction: of the paper only the abstract was at hand; what is evaluated is the method of the program. Weights
    are ours (the program has equal ones). The steps run on the coefficients of m in the span of the u_i, which needs
    the dot products alone. A tensor counts as zero relative to the longest, not to an absolute number. Where the mean
    is not unique (directions that cancel, or one opposite to the mean) the program's answer depends on the order of
    the models; here the tensors are averaged linearly, and `facts` says so.

Cost:
    No passes; two reads of each model and one write at any number of steps, a few MB of memory.

Limits:
    The mean is unique only for directions within a half sphere; `facts` says where the steps did not come to rest.
    Needs several models, so there is no search with one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace, Stats, TensorEntry
from keelwright.ops.affine import sum_from_base
from keelwright.ops.gram import cosines, gram
from keelwright.ops.per_model import normalized, one_per_model, require_models, require_numbers
from keelwright.weights.edit import Edit, model_roles, tuned_roles

_OPPOSITE = 1e-6


@dataclass(frozen=True, slots=True)
class KarcherConfig:
    """Settings of the Karcher mean."""

    weight: float | tuple[float, ...] = 1.0
    """Weight of each model in the order given, 0 or more; only their ratios count. Source: ours; the program's are
    equal."""

    max_iter: int = 10
    """Most steps. At least 1. Source: mergekit."""

    tol: float = 1e-5
    """Length of a step, in radians, that ends the iteration; tensors shorter than this share of the longest have no
    direction. Between 0 and 1. Source: mergekit."""

    def __post_init__(self) -> None:
        require_numbers("weight", self.weight, low=0.0)
        require_in_range("max_iter", self.max_iter, low=1)
        require_in_range("tol", self.tol, low=0.0, high=1.0, low_open=True, high_open=True)


@dataclass(frozen=True, slots=True)
class KarcherMean:
    """The mean at the mean norm, as a weighted sum of the vectors."""

    weights: tuple[float, ...]
    steps: int
    """Steps taken."""
    rest: float
    """Length of the step that would come next, in radians."""
    is_unique: bool
    """False where the vectors themselves were averaged."""


def karcher_mean(
    products: Float[Tensor, "models models"], shares: Sequence[float], *, max_iter: int = 10, tol: float = 1e-5
) -> KarcherMean:
    """Return the Karcher mean of directions at the mean norm, from dot products alone.

    Args:
        products: Dot products of the vectors, float64.
        shares: Weights of the vectors, 0 or more; they sum to one.
        max_iter: Most steps.
        tol: Length of a step that ends the iteration, in radians.
    """
    norms = products.diagonal().clamp_min(0.0).sqrt()
    parts = torch.tensor(list(shares), dtype=torch.float64)
    linear = KarcherMean(tuple(shares), 0, 0.0, is_unique=False)
    taking_part = (norms > tol * norms.max()) & (parts > 0.0)
    if not bool(taking_part.any()):
        # Nothing but zeros (or zero weights on all that is not): the sum is zero whatever the weights.
        return KarcherMean((0.0,) * len(norms), 0, 0.0, is_unique=True)
    size = float(parts @ norms)
    units = cosines(products)[taking_part][:, taking_part].fill_diagonal_(1.0)
    parts = parts[taking_part] / parts[taking_part].sum()
    mean = parts / parts.sum()
    length = _length(mean, units)
    if length < tol:
        return linear
    mean, steps, rest = mean / length, 0, 0.0
    for steps in range(max_iter + 1):
        towards = (units @ mean).clamp(-1.0, 1.0)
        if bool((1.0 + towards < _OPPOSITE).any()):
            return linear
        move = _tangent(mean, towards, parts, tol)
        rest = _length(move, units)
        if rest < tol or steps == max_iter:
            break
        mean = math.cos(rest) * mean + math.sin(rest) / rest * move
        mean = mean / _length(mean, units)
    weights = torch.zeros_like(norms)
    weights[taking_part] = size * mean / norms[taking_part]
    return KarcherMean(tuple(weights.tolist()), steps, rest, is_unique=True)


def karcher(
    models: Sequence[Float[Tensor, "*shape"]],
    weights: Sequence[float],
    *,
    max_iter: int = 10,
    tol: float = 1e-5,
) -> Float[Tensor, "*shape"]:
    """Return the Karcher mean of the tensors' directions at their mean norm, in the tensors' dtype.

    Args:
        models: In float32 or float64.
        weights: One per model, 0 or more.
        max_iter: Most steps.
        tol: Length of a step that ends the iteration, in radians.

    Raises:
        ConfigError: All weights are zero.
    """
    mean = karcher_mean(gram(models), normalized("weight", weights), max_iter=max_iter, tol=tol)
    return sum_from_base(models, mean.weights)


@dataclass(frozen=True, slots=True)
class Karcher(Edit):
    """The Karcher mean of several models as a weight edit."""

    config: KarcherConfig = KarcherConfig()
    models: int = 1
    """Number of tuned models."""

    config_class: ClassVar[type[KarcherConfig]] = KarcherConfig
    search_space: ClassVar[SearchSpace | None] = None
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        require_models("karcher", self.models, least=self.min_models)
        self._shares()

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return tuned_roles(self.models)

    def reach(self, name: str) -> Reach:
        """Return COPY where one model has all the weight, else REDUCED."""
        return Reach.COPY if 1.0 in self._shares() else Reach.REDUCED

    def copies(self, name: str) -> str:
        """Return the role that has all the weight."""
        return model_roles(self.models)[self._shares().index(1.0)]

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return the dot products of the chunk."""
        return {"products": gram(self._inputs(chunk))}

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """Return the weights of the models for this tensor."""
        config = self.config
        if not sums:
            return {}
        return {"mean": karcher_mean(sums["products"], self._shares(), max_iter=config.max_iter, tol=config.tol)}

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the chunk of the mean at the mean norm."""
        return sum_from_base(self._inputs(chunk), found["mean"].weights)

    def facts(self, found: Found) -> dict[str, float]:
        """Return the steps of a tensor, and 1 where there was no unique mean or the steps did not come to rest."""
        if not found:
            return {}
        mean: KarcherMean = found["mean"]
        return {
            "steps": float(mean.steps),
            "fell_back": float(not mean.is_unique),
            "unsettled": float(mean.rest >= self.config.tol),
        }

    def _inputs(self, chunk: Chunk) -> list[Tensor]:
        return [chunk.tensors[role] for role in model_roles(self.models)]

    def _shares(self) -> tuple[float, ...]:
        return normalized("weight", one_per_model("weight", self.config.weight, self.models))


def _length(coefficients: Tensor, units: Tensor) -> float:
    """Return the length of a sum of unit vectors with these cosines."""
    return math.sqrt(max(0.0, float(coefficients @ units @ coefficients)))


def _tangent(mean: Tensor, towards: Tensor, parts: Tensor, tol: float) -> Tensor:
    """Return the coefficients of the mean of the logarithms at `mean`."""
    angles = torch.acos(towards)
    pulls = torch.where(angles < tol, 0.0, parts * angles / torch.sin(angles).clamp_min(1e-300))
    return pulls - (pulls * towards).sum() * mean
