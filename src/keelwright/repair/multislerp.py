# SPDX-License-Identifier: Apache-2.0
"""Multi-SLERP: the weighted mean direction of several models, at the weighted mean of their norms.

For averages of models that are far apart: a plain average shrinks every tensor, this one keeps its norm.

Source:
    Goddard: mergekit 0.1.5, merge method `multislerp`, with the author's description of it (no paper; facts of the
    documentation).

Equation:
    `M = sum_i w_i u_i`, `u_i = d_i / |d_i|`, `out = b + (sum_i w_i |d_i|) M / |M|`; without a base, `x_i` for `d_i`
    and no b

    | symbol | name |
    |---|---|
    | b | `aligned`, where `based` |
    | x_i | `tuned`, `tuned_2`, ... |
    | d_i | the task vector `x_i - b` |
    | w_i | `weight`, divided by their sum with `normalize_weights` |

Differs from the official code:
    The description projects the directions into the tangent space at `M / |M|`, sums them there with the same weights
    and maps back. That sum is zero for every input, so what is left is the equation above, and that is what is
    evaluated. Where all task vectors of a tensor are zero, the base (or zero) comes out.

Cost:
    No passes; two reads of each model and one write, a few MB of memory.

Limits:
    No true mean on the sphere, which `karcher` gives. Directions that cancel (`|M|` below `eps`) have no mean: two
    models are then summed linearly and `facts` says so; more than two are an error. Needs several models, so there is
    no search with one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.errors import NumericalError
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace, Stats, TensorEntry
from keelwright.ops.affine import sum_from_base
from keelwright.ops.gram import cosines, gram
from keelwright.ops.per_model import normalized, one_per_model, require_models, require_numbers
from keelwright.weights.edit import Edit, model_roles, tuned_roles


@dataclass(frozen=True, slots=True)
class MultislerpConfig:
    """Settings of the mean direction of several models."""

    weight: float | tuple[float, ...] = 1.0
    """Weight of each model in the order given; a single number counts for all. Any finite numbers."""

    normalize_weights: bool = True
    """Divide the weights by their sum. Source: mergekit."""

    eps: float = 1e-8
    """Length of the mean of unit vectors below which there is no direction. Above 0. Source: mergekit."""

    def __post_init__(self) -> None:
        require_numbers("weight", self.weight)
        require_in_range("eps", self.eps, low=0.0, low_open=True, high_open=True)


@dataclass(frozen=True, slots=True)
class MeanDirection:
    """The mean direction at the mean norm, as a weighted sum of the vectors."""

    weights: tuple[float, ...]
    length: float
    """`|M|`: 1 where all directions agree, 0 where they cancel."""
    is_linear: bool
    """Whether the directions of two vectors cancel, so that the vectors themselves are summed."""


def mean_direction(
    products: Float[Tensor, "models models"], weights: Sequence[float], *, eps: float = 1e-8
) -> MeanDirection | None:
    """Return the mean direction at the mean norm; None where more than two directions cancel.

    Args:
        products: Dot products of the vectors, float64.
        weights: One per vector, normalised if they are to be.
        eps: Length below which there is no direction.
    """
    norms = products.diagonal().clamp_min(0.0).sqrt().tolist()
    if not any(norms):
        return MeanDirection((0.0,) * len(norms), 0.0, is_linear=False)
    similar = cosines(products).tolist()
    count = range(len(norms))
    squared = math.fsum(weights[i] * weights[j] * similar[i][j] for i in count for j in count)
    length = math.sqrt(max(0.0, squared))
    if length < eps:
        return MeanDirection(tuple(weights), length, is_linear=True) if len(norms) == 2 else None
    size = math.fsum(weight * norm for weight, norm in zip(weights, norms, strict=True))
    shares = (weight * size / length / norm if norm > 0.0 else 0.0 for weight, norm in zip(weights, norms, strict=True))
    return MeanDirection(tuple(shares), length, is_linear=False)


def multislerp(
    models: Sequence[Float[Tensor, "*shape"]],
    weights: Sequence[float],
    *,
    base: Float[Tensor, "*shape"] | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Float[Tensor, "*shape"]:
    """Return the mean direction of tensors, or of their task vectors, at the mean norm, in the tensors' dtype.

    Args:
        models: In float32 or float64.
        weights: One per model.
        base: Where task vectors start; None for none.
        normalize_weights: Divide the weights by their sum.
        eps: Length below which there is no direction.

    Raises:
        NumericalError: The directions of more than two models cancel.
        ConfigError: The weights sum to zero and are to be normalised.
    """
    shares = normalized("weight", weights) if normalize_weights else weights
    mean = _require_mean(mean_direction(gram(models, base=base), shares, eps=eps), "the tensor", eps)
    return sum_from_base(models, mean.weights, base)


@dataclass(frozen=True, slots=True)
class Multislerp(Edit):
    """The mean direction of several models as a weight edit."""

    config: MultislerpConfig = MultislerpConfig()
    models: int = 1
    """Number of tuned models."""
    based: bool = False
    """Whether the directions are those of task vectors from the aligned model."""

    config_class: ClassVar[type[MultislerpConfig]] = MultislerpConfig
    search_space: ClassVar[SearchSpace | None] = None
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        require_models("multislerp", self.models, least=self.min_models)
        self._weights()

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return (*(("aligned",) if self.based else ()), *tuned_roles(self.models))

    def reach(self, name: str) -> Reach:
        """Return COPY for a single model, else REDUCED."""
        return Reach.COPY if self.models == 1 and self._weights() == (1.0,) else Reach.REDUCED

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return the dot products of the chunk."""
        models, base = self._inputs(chunk)
        return {"products": gram(models, base=base)}

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """Return the weights of the models for this tensor.

        Raises:
            NumericalError: The directions of more than two models cancel.
        """
        if not sums:
            return {}
        eps = self.config.eps
        mean = mean_direction(sums["products"], self._weights(), eps=eps)
        return {"mean": _require_mean(mean, f"tensor '{entry.name}'", eps)}

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the chunk of the mean direction at the mean norm."""
        models, base = self._inputs(chunk)
        return sum_from_base(models, found["mean"].weights, base)

    def facts(self, found: Found) -> dict[str, float]:
        """Return how far the directions of a tensor agree, 0 to 1, and 1 where two of them cancel."""
        if not found:
            return {}
        return {"agreement": found["mean"].length, "fell_back": float(found["mean"].is_linear)}

    def _inputs(self, chunk: Chunk) -> tuple[list[Tensor], Tensor | None]:
        models = [chunk.tensors[role] for role in model_roles(self.models)]
        return models, chunk.tensors["aligned"] if self.based else None

    def _weights(self) -> tuple[float, ...]:
        weights = one_per_model("weight", self.config.weight, self.models)
        return normalized("weight", weights) if self.config.normalize_weights else weights


def _require_mean(mean: MeanDirection | None, where: str, eps: float) -> MeanDirection:
    if mean is None:
        raise NumericalError(
            f"The models have no mean direction: {where}.",
            expected=f"a weighted mean of unit vectors of length {eps:g} or more",
            found="directions that cancel",
            fix="use other weights, another method such as linear, or fewer models",
        )
    return mean
