# SPDX-License-Identifier: Apache-2.0
"""Model Stock: as far from the aligned model towards the mean of its fine-tunes as their angle says.

For several fine-tunes of one parent on the same task, for example seeds: what they have in common is kept, what differs
is taken for noise. There is no strength to choose.

Source:
    Jang, Yun, Han: Model Stock: All we need is just a few fine-tuned models, arXiv 2403.19522. For more than two
    models: merge method `model_stock` of mergekit 0.1.5 (facts of its documentation). Used for repair in
    arXiv 2412.19512.

Equation:
    `out = b + t (mean_i x_i - b)`, `t = k c / (1 + (k - 1) c)`, `c` the mean over pairs of
    `<d_i, d_j> / (|d_i| |d_j|)`, for each tensor or for each row of its first axis

    | symbol | name |
    |---|---|
    | b | `aligned` |
    | x_1 .. x_k | `tuned`, `tuned_2`, ... |
    | d_i | the task vector `x_i - b` |

Differs from the official code:
    Reconstruction: the paper derives the ratio for two models and leaves more open; the mean cosine over pairs is the
    program's reading and ours. The program bounds the product of norms from below by 1e-6, which pulls the cosine of
    small changes to 0; here only a task vector of zero has cosine 0. Opposed task vectors (c below 0) give a ratio
    below 0, a step away from the fine-tunes: `clip` holds it in 0 to 1, `clip: false` is the program's.

Cost:
    No passes; two reads of each model and one write. By rows, a few numbers per row.

Limits:
    Needs at least two fine-tunes of one parent, so there is no search with one. For unrelated task vectors the ratio
    is near 0 and the aligned model comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace, Stats, TensorEntry
from keelwright.ops.affine import sum_from_base
from keelwright.ops.gram import gram
from keelwright.ops.per_model import require_models
from keelwright.ops.vectors import at_rows, row_sums
from keelwright.weights.edit import Edit, model_roles, tuned_roles

_NO_RATIO = 1e-12


@dataclass(frozen=True, slots=True)
class ModelStockConfig:
    """Settings of Model Stock."""

    filter_wise: bool = False
    """One ratio per row of the first axis; a tensor of one axis is one row. Source: mergekit."""

    clip: bool = True
    """Hold the ratio in 0 to 1. Source: ours; off for mergekit's numbers."""


def stock_ratio(products: Float[Tensor, "*vectors models models"], *, clip: bool = True) -> Float[Tensor, "*vectors"]:
    """Return how far to go from the base towards the mean of the models: 0 to 1 where the ratio is clipped.

    Args:
        products: Dot products of the task vectors, float64.
        clip: Hold the ratio in 0 to 1.
    """
    count = products.shape[-1]
    squares = products.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)
    # The root of the product, not the product of roots: equal vectors then have a cosine of exactly 1.
    sizes = (squares[..., :, None] * squares[..., None, :]).sqrt()
    similar = torch.where(sizes > 0.0, products / torch.where(sizes > 0.0, sizes, 1.0), 0.0).clamp(-1.0, 1.0)
    first, second = torch.triu_indices(count, count, offset=1)
    cosine = similar[..., first, second].mean(-1)
    below = 1.0 + (count - 1) * cosine
    ratio = torch.where(below.abs() < _NO_RATIO, 0.0, count * cosine / torch.where(below.abs() < _NO_RATIO, 1.0, below))
    return ratio.clamp(0.0, 1.0) if clip else ratio


def model_stock(
    base: Float[Tensor, "*shape"],
    models: Sequence[Float[Tensor, "*shape"]],
    *,
    filter_wise: bool = False,
    clip: bool = True,
) -> Float[Tensor, "*shape"]:
    """Return the base moved towards the mean of the models by the ratio of their angle, in the tensors' dtype.

    Args:
        base: In float32 or float64.
        models: At least two.
        filter_wise: One ratio per row of the first axis.
        clip: Hold the ratio in 0 to 1.
    """
    if filter_wise and base.ndim > 1:
        ratios = stock_ratio(_row_products(base, models, base.numel() // base.shape[0], 0), clip=clip)
        return _move(base, models, ratios.view(-1, *[1] * (base.ndim - 1)))
    ratio = float(stock_ratio(gram(models, base=base), clip=clip))
    return sum_from_base(models, (ratio / len(models),) * len(models), base)


@dataclass(frozen=True, slots=True)
class ModelStock(Edit):
    """Model Stock as a weight edit."""

    config: ModelStockConfig = ModelStockConfig()
    models: int = 2
    """Number of tuned models, at least two."""

    config_class: ClassVar[type[ModelStockConfig]] = ModelStockConfig
    search_space: ClassVar[SearchSpace | None] = None
    min_models: ClassVar[int] = 2
    max_models: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        require_models("model_stock", self.models, least=self.min_models)

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return ("aligned", *tuned_roles(self.models))

    def reach(self, name: str) -> Reach:
        """Return REDUCED."""
        return Reach.REDUCED

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return the dot products of the task vectors in the chunk, in all or by row."""
        base, models = self._inputs(chunk)
        if not self._by_rows(chunk.entry):
            return {"products": gram(models, base=base)}
        # Under a key of its own: the few rows of this chunk, not an array for all rows, which the engine would add up.
        columns = chunk.entry.elements // chunk.entry.shape[0]
        return {str(chunk.offset): _row_products(base, models, columns, chunk.offset)}

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """Return the ratio of the tensor, or of each of its rows."""
        if not sums:
            return {}
        if not self._by_rows(entry):
            return {"ratio": stock_ratio(sums["products"], clip=self.config.clip)}
        rows, columns = entry.shape[0], entry.elements // entry.shape[0]
        products = torch.zeros(rows, self.models, self.models, dtype=torch.float64)
        for offset, part in sums.items():
            first = int(offset) // columns
            products[first : first + len(part)] += part
        return {"ratio": stock_ratio(products, clip=self.config.clip)}

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the chunk moved towards the mean of the models."""
        base, models = self._inputs(chunk)
        if not self._by_rows(chunk.entry):
            share = float(found["ratio"]) / self.models
            return sum_from_base(models, (share,) * self.models, base)
        columns = chunk.entry.elements // chunk.entry.shape[0]
        return _move(base, models, at_rows(found["ratio"], columns, base.numel(), chunk.offset))

    def facts(self, found: Found) -> dict[str, float]:
        """Return the ratio of a tensor, the mean over its rows where they have their own."""
        return {"ratio": float(found["ratio"].mean())} if found else {}

    def _by_rows(self, entry: TensorEntry) -> bool:
        return self.config.filter_wise and len(entry.shape) > 1

    def _inputs(self, chunk: Chunk) -> tuple[Tensor, list[Tensor]]:
        return chunk.tensors["aligned"], [chunk.tensors[role] for role in model_roles(self.models)]


def _row_products(base: Tensor, models: Sequence[Tensor], columns: int, offset: int) -> Tensor:
    """Return dot products of task vectors by row, for the rows that a run touches, in float64."""
    deltas = [(model - base).double().reshape(-1) for model in models]
    start = offset % columns
    rows = -(-(start + base.numel()) // columns)
    out = torch.zeros(rows, len(models), len(models), dtype=torch.float64)
    for i, first in enumerate(deltas):
        for j in range(i, len(models)):
            out[:, i, j] = out[:, j, i] = row_sums(first * deltas[j], columns, rows, start)
    return out


def _move(base: Tensor, models: Sequence[Tensor], ratios: Tensor) -> Tensor:
    """Return each element moved towards the mean of the models by its own ratio."""
    mean = sum_from_base(models, (1.0 / len(models),) * len(models))
    moved = base + ratios.to(base.dtype) * (mean - base)
    # base + (mean - base) may differ from the mean in the last place.
    return torch.where(ratios == 1.0, mean, moved)
