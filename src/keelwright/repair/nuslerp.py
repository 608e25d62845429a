# SPDX-License-Identifier: Apache-2.0
"""NuSLERP: spherical interpolation of two tuned models, or of their task vectors, by whole tensors or single vectors.

For two fine-tunes of one parent: the arc between their task vectors keeps the size of the change, where their average
would shrink it.

Source:
    Goddard: mergekit 0.1.5, merge method `nuslerp` (no paper; facts of its documentation, sheet of known answers).

Equation:
    `out = b + slerp(d_1, d_2; t)` with `t = w_2 / (w_1 + w_2)`; without a base `out = slerp(x_1, x_2; t)`
    `slerp(p, q; t) = sin((1 - t) W) / sin W * p + sin(t W) / sin W * q`, `W` the angle between p and q

    | symbol | name |
    |---|---|
    | b | `aligned`, where `based` |
    | x_1, x_2 | `tuned`, `tuned_2` |
    | d_i | the task vector `x_i - b` |
    | w_i | `weight` |

Differs from the official code:
    Linear for a zero vector, where the official code takes the coefficients of a right angle; and linear for opposite
    vectors (cosine below -1 + 1e-6), where the coefficients grow without bound. `t` is 0.5 where `|w_1 + w_2| < 1e-6`,
    as there.

Cost:
    No passes; two reads of each model and one write. By vectors along the first axis, three numbers per column.

Limits:
    Needs two tuned models, so there is no search with one. Opposite vectors may cancel at t = 0.5; `facts` counts
    them, and every vector that was interpolated linearly. The documentation names the two axes the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace, Stats, TensorEntry
from keelwright.ops.affine import sum_from_base
from keelwright.ops.gram import gram
from keelwright.ops.per_model import one_per_model, require_models, require_numbers
from keelwright.ops.sphere import many_arc_weights
from keelwright.ops.vectors import at_columns, column_sums
from keelwright.weights.edit import Edit, tuned_roles

_NO_WEIGHT = 1e-6
_PARALLEL = 1e-16
_OPPOSITE = 1e-6


@dataclass(frozen=True, slots=True)
class NuslerpConfig:
    """Settings of spherical interpolation of two tuned models."""

    weight: float | tuple[float, ...] = 1.0
    """Weight of each model in the order given; only their ratio counts. Any finite numbers."""

    flatten: bool = True
    """Interpolate each tensor as one vector; else as many vectors. Source: mergekit, `nuslerp_flatten`."""

    row_wise: bool = False
    """Where `flatten` is off: vectors along the first axis, `W[:, j]`; else along the last axis, `W[i, :]`. A tensor of
    one axis is one vector. Source: mergekit, `nuslerp_row_wise`, whose documentation says it the other way round."""

    def __post_init__(self) -> None:
        require_numbers("weight", self.weight)


@dataclass(frozen=True, slots=True)
class Arcs:
    """How to interpolate pairs of vectors."""

    first: Float[Tensor, "*vectors"]
    """Weights of the first vectors, float64."""
    second: Float[Tensor, "*vectors"]
    is_linear: Bool[Tensor, "*vectors"]
    is_opposite: Bool[Tensor, "*vectors"]


def place(weights: tuple[float, ...]) -> float:
    """Return the place on the arc between the first and the second model: `w_2 / (w_1 + w_2)`.

    >>> place((1.0, 3.0))
    0.75
    """
    total = weights[0] + weights[1]
    return 0.5 if abs(total) < _NO_WEIGHT else weights[1] / total


def arcs(
    first: Float[Tensor, "*vectors"], both: Float[Tensor, "*vectors"], second: Float[Tensor, "*vectors"], t: float
) -> Arcs:
    """Return how to interpolate pairs of vectors, from their dot products.

    Args:
        first: `<p, p>` of each pair, float64.
        both: `<p, q>`.
        second: `<q, q>`.
        t: Place on the arc.
    """
    # The root of the product, not the product of roots: equal vectors then have a cosine of exactly 1.
    sizes = (first * second).sqrt()
    is_zero = sizes == 0.0
    cosines = (both / torch.where(is_zero, 1.0, sizes)).clamp(-1.0, 1.0)
    is_opposite = (1.0 + cosines < _OPPOSITE) & ~is_zero
    is_linear = is_zero | is_opposite | (1.0 - cosines.square() <= _PARALLEL)
    return Arcs(*many_arc_weights(cosines, t, is_linear), is_linear, is_opposite)


def nuslerp(
    models: tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]],
    weights: tuple[float, float],
    *,
    base: Float[Tensor, "*shape"] | None = None,
    flatten: bool = True,
    row_wise: bool = False,
) -> Float[Tensor, "*shape"]:
    """Return the point between two tensors on the arc, or on the arcs between their vectors, in their own dtype.

    Args:
        models: In float32 or float64.
        weights: One per model.
        base: Where given, the arc is between the task vectors and starts there.
        flatten: Whether the tensor is one vector.
        row_wise: Vectors along the first axis, not the last; read where `flatten` is off.
    """
    t = place(weights)
    if flatten or models[0].ndim < 2:
        products = gram(models, base=base)
        arc = arcs(products[0, 0], products[0, 1], products[1, 1], t)
        return sum_from_base(models, (float(arc.first), float(arc.second)), base)
    axis = 0 if row_wise else -1
    arc = arcs(*_products(models, base, axis), t)
    return _interpolate(models, base, *(one.unsqueeze(axis) for one in (arc.first, arc.second, arc.is_linear)))


@dataclass(frozen=True, slots=True)
class Nuslerp(Edit):
    """Spherical interpolation of two tuned models as a weight edit."""

    config: NuslerpConfig = NuslerpConfig()
    models: int = 2
    """Number of tuned models: two."""
    based: bool = False
    """Whether the arc is between task vectors from the aligned model."""

    config_class: ClassVar[type[NuslerpConfig]] = NuslerpConfig
    search_space: ClassVar[SearchSpace | None] = None
    min_models: ClassVar[int] = 2
    max_models: ClassVar[int | None] = 2

    def __post_init__(self) -> None:
        require_models("nuslerp", self.models, least=2, most=2)
        one_per_model("weight", self.config.weight, 2)

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return (*(("aligned",) if self.based else ()), *tuned_roles(self.models))

    def reach(self, name: str) -> Reach:
        """Return COPY at both ends of the arc, ROWS for vectors along the last axis, else REDUCED."""
        if self._place() in (0.0, 1.0):
            return Reach.COPY
        return Reach.ROWS if not self.config.flatten and not self.config.row_wise else Reach.REDUCED

    def copies(self, name: str) -> str:
        """Return the role that an end of the arc stands for."""
        return "tuned" if self._place() == 0.0 else "tuned_2"

    def passes(self, name: str) -> int:
        """Return one pass."""
        return int(self.reach(name) is not Reach.COPY)

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return the dot products of the chunk: in all, by column, or counts of what its rows are."""
        models, base = self._inputs(chunk)
        if self.config.flatten:
            return {"products": gram(models, base=base)}
        if self.config.row_wise:
            shape = chunk.entry.shape
            columns = chunk.entry.elements // shape[0] if len(shape) > 1 else 1
            return {
                "columns": torch.stack(
                    [column_sums(product, columns, chunk.offset) for product in _elementwise(models, base)]
                )
            }
        return _counts(arcs(*_products(models, base, -1), self._place()))

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """Return the weights of both models, one pair or one per column, and how many arcs were none."""
        if "products" in sums:
            products = sums["products"]
            arc = arcs(products[0, 0], products[0, 1], products[1, 1], self._place())
        elif "columns" in sums:
            first, both, second = sums["columns"]
            arc = arcs(first, both, second, self._place())
        else:
            return sums
        return {"arcs": arc, **_counts(arc)}

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the chunk of the interpolated tensor."""
        models, base = self._inputs(chunk)
        if self.config.flatten:
            return sum_from_base(models, (float(found["arcs"].first), float(found["arcs"].second)), base)
        if self.config.row_wise:
            arc, size = found["arcs"], models[0].numel()
            parts = (at_columns(one, size, chunk.offset) for one in (arc.first, arc.second, arc.is_linear))
            return _interpolate(models, base, *parts)
        arc = arcs(*_products(models, base, -1), self._place())
        return _interpolate(models, base, *(one[:, None] for one in (arc.first, arc.second, arc.is_linear)))

    def facts(self, found: Found) -> dict[str, float]:
        """Return the number of vectors of a tensor, how many were interpolated linearly, and how many are opposite."""
        return {key: float(found[key]) for key in ("vectors", "fell_back", "opposite") if key in found}

    def _inputs(self, chunk: Chunk) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        return (chunk.tensors["tuned"], chunk.tensors["tuned_2"]), chunk.tensors["aligned"] if self.based else None

    def _place(self) -> float:
        return place(one_per_model("weight", self.config.weight, 2))


def _elementwise(models: tuple[Tensor, Tensor], base: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return p p, p q and q q in float64; differences from the base are taken in the tensors' dtype."""
    first, second = (one if base is None else one - base for one in models)
    p, q = first.double(), second.double()
    return p * p, p * q, q * q


def _products(models: tuple[Tensor, Tensor], base: Tensor | None, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    first, both, second = (product.sum(axis) for product in _elementwise(models, base))
    return first, both, second


def _interpolate(
    models: tuple[Tensor, Tensor], base: Tensor | None, first: Tensor, second: Tensor, is_linear: Tensor
) -> Tensor:
    p, q = (one if base is None else one - base for one in models)
    out = p * first.to(p.dtype) + q * second.to(p.dtype)
    if base is not None:
        out += base
    # Interpolated linearly, an entry that both share stays; rounding could move it by one unit in the last place.
    return torch.where(is_linear & (models[0] == models[1]), models[0], out)


def _counts(arc: Arcs) -> dict[str, int]:
    return {
        "vectors": arc.is_linear.numel(),
        "fell_back": int(arc.is_linear.sum()),
        "opposite": int(arc.is_opposite.sum()),
    }
