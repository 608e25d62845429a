# SPDX-License-Identifier: Apache-2.0
"""The steps that the task-vector family shares: subtract, drop and rescale, add up.

A task vector is what tuning added to a base: `d_i = x_i - b`. Every method of the family drops part of each vector,
weighs them, adds those that agree and puts `lambda` times the sum on the base; they differ in what they drop.

Source:
    Task arithmetic, arXiv 2212.04089; the steps are those of TIES-Merging, arXiv 2306.01708, DARE, arXiv 2311.03099,
    and DELLA, arXiv 2406.11617.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keelwright.ops.combine import Election, elected_sum, weighted_sum
from keelwright.ops.order_statistics import kept_count
from keelwright.ops.philox import Key, uniforms

Rescale = Literal["none", "inverse_keep", "l1"]
"""none; inverse_keep: divide by the chance of being kept; l1: give the kept entries the sum of magnitudes of all."""
RESCALES: tuple[Rescale, ...] = ("none", "inverse_keep", "l1")

_NEGLIGIBLE = 1e-7


def add_merged(
    base: Float[Tensor, "*shape"],
    vectors: Sequence[Float[Tensor, "*shape"]],
    weights: Sequence[float],
    *,
    coefficient: float,
    elect: Election = "none",
    normalize: bool = False,
    zero_is_plus: bool = True,
) -> Float[Tensor, "*shape"]:
    """Return `base + coefficient * merged`, where merged is the sum of the vectors that agree with the elected sign.

    Args:
        base: What the task vectors were subtracted from; float32 or float64.
        vectors: Task vectors times their weights, one per model.
        weights: Those weights; `normalize` divides by the sum of the ones that took part.
        coefficient: Strength of the merged vector.
        elect: How the sign is chosen, entry by entry.
        normalize: Divide the weights out again.
        zero_is_plus: Which sign an entry gets where the election is a tie.
    """
    if zero_is_plus:
        merged = elected_sum(vectors, weights, elect=elect, normalize=normalize)
        return weighted_sum((base, merged), (1.0, coefficient))
    # A tie elects plus, so the mirrored vectors elect minus.
    merged = elected_sum([-vector for vector in vectors], weights, elect=elect, normalize=normalize)
    return weighted_sum((base, merged), (1.0, -coefficient))


def trim(values: Float[Tensor, "*shape"], kept: int, *, dropped: int = 0) -> Float[Tensor, "*shape"]:
    """Return the values with only `kept` entries left: the largest magnitudes after the `dropped` largest.

    Of equal magnitudes the lowest flat index counts as the larger. Sorts, so it is for tensors in memory; edits that
    stream come to the same by `keelwright.weights.threshold`.

    Args:
        values: Task vector, any shape.
        kept: How many entries stay.
        dropped: How many larger ones go.
    """
    order = values.flatten().abs().argsort(descending=True, stable=True)[dropped : dropped + kept]
    out = torch.zeros_like(values).flatten()
    out[order] = values.flatten()[order]
    return out.view(values.shape)


def magnitude_sum(values: Float[Tensor, "*shape"]) -> float:
    """Return the sum of magnitudes, accumulated in float64."""
    return float(torch.linalg.vector_norm(values, ord=1, dtype=torch.float64)) if values.numel() else 0.0


def l1_scale(total: float, kept: float) -> float:
    """Return what the kept entries are multiplied with so that their magnitudes add up to those of all.

    Args:
        total: Sum of magnitudes of the whole task vector.
        kept: Sum of magnitudes of the kept entries.

    Returns:
        `total / kept`, or 1 where either is below 1e-7.
    """
    return 1.0 if total < _NEGLIGIBLE or kept < _NEGLIGIBLE else total / kept


def weigh(
    deltas: Sequence[Float[Tensor, "*shape"]],
    kept: Sequence[Float[Tensor, "*shape"]],
    weights: Sequence[float],
    densities: Sequence[float],
    rescale: Rescale,
) -> list[Float[Tensor, "*shape"]]:
    """Return the kept part of each task vector, rescaled and times its weight.

    Args:
        deltas: The whole task vectors.
        kept: The same with zeros where an entry was dropped.
        weights: One per model.
        densities: Share kept, one per model.
        rescale: What makes up for the dropped entries.
    """
    vectors = []
    for delta, part, weight, density in zip(deltas, kept, weights, densities, strict=True):
        scale = 1.0 / density if rescale == "inverse_keep" else 1.0
        if rescale == "l1":
            scale = l1_scale(magnitude_sum(delta), magnitude_sum(part))
        vectors.append(part * (weight * scale))
    return vectors


def breadcrumb_counts(elements: int, *, density: float, gamma: float) -> tuple[int, int]:
    """Return how many of the largest magnitudes are dropped, and how many of the next are kept.

    Args:
        elements: Size of the tensor.
        density: Share kept.
        gamma: Share of the largest to drop. Where the two do not fit together the density wins: the bottom keeps
            everything and the top loses more.
    """
    kept = kept_count(density, elements)
    bottom = max(0, elements - kept - int(gamma * elements))
    return elements - kept - bottom, kept


def ascending_ranks(values: Float[Tensor, "*rows columns"]) -> Int[Tensor, "*rows columns"]:
    """Return each entry's place by magnitude in its row, 0 for the smallest; of equal ones the first comes first."""
    order = values.abs().argsort(dim=-1, stable=True)
    places = torch.arange(values.shape[-1]).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def keep_probabilities(
    values: Float[Tensor, "*rows columns"], *, density: float, epsilon: float
) -> Float[Tensor, "*rows columns"]:
    """Return the chance of each entry to be kept, in float64: larger magnitudes of a row are kept more often.

    Args:
        values: Task vector, row by row.
        density: Mean chance of every row.
        epsilon: The smallest entry of a row has `density - epsilon`, the largest `density + epsilon`, the others lie
            evenly between by rank. A row of one entry has `density`.

    Source:
        DELLA-Merging, arXiv 2406.11617, section 3 (MagPrune).
    """
    columns = values.shape[-1]
    if columns == 1:
        return torch.full(values.shape, density, dtype=torch.float64)
    steps = torch.arange(columns, dtype=torch.float64) / (columns - 1)
    return (density - epsilon + 2.0 * epsilon * steps)[ascending_ranks(values)]


def prune_by_rank(
    values: Float[Tensor, "*rows columns"],
    *,
    density: float,
    epsilon: float,
    key: Key,
    offset: int,
    divide: bool,
    scale: float = 1.0,
) -> Float[Tensor, "*rows columns"]:
    """Return the task vector with entries dropped at random, the small ones of a row more often.

    Args:
        values: Whole rows of the task vector.
        density, epsilon: As for `keep_probabilities`; with density 1 nothing is dropped.
        key: Stream of random numbers.
        offset: Flat index of the first entry.
        divide: Divide what is kept by its own chance of being kept.
        scale: What is kept is multiplied with it.
    """
    if density >= 1.0:
        return values * scale
    chances = keep_probabilities(values, density=density, epsilon=epsilon)
    is_kept = uniforms(key, offset, values.numel()).view(values.shape) < chances
    factors = (scale / chances if divide else torch.full_like(chances, scale)).to(values.dtype)
    return torch.where(is_kept, values * factors, 0.0)


def support_counts(
    deltas: Sequence[Float[Tensor, "*shape"]], *, epsilon: float
) -> tuple[list[Tensor], Int[Tensor, "*shape"]]:
    """Return where each task vector changes something, and how many of them do so at each entry.

    Args:
        deltas: Task vectors.
        epsilon: Changes up to this size count as none, weight units.
    """
    supports = [delta.abs() > epsilon for delta in deltas]
    counts = torch.zeros_like(deltas[0], dtype=torch.int32)
    for support in supports:
        counts += support
    return supports, counts


def add_disjoint_and_mean(
    base: Float[Tensor, "*shape"],
    deltas: Sequence[Float[Tensor, "*shape"]],
    *,
    epsilon: float,
    factors: Sequence[float],
) -> Float[Tensor, "*shape"]:
    """Return the base plus, per entry, the one task vector that changes it times its factor, or the mean of several.

    Args:
        base: What the task vectors were subtracted from.
        deltas: Task vectors.
        epsilon: Changes up to this size count as none.
        factors: One per task vector, for the entries that it alone changes.

    Source:
        RAM, arXiv 2601.13572.
    """
    supports, counts = support_counts(deltas, epsilon=epsilon)
    is_unique, shared = counts == 1, counts.clamp_min(1).to(base.dtype)
    alone, together = torch.zeros_like(base), torch.zeros_like(base)
    for delta, support, factor in zip(deltas, supports, factors, strict=True):
        alone += torch.where(support & is_unique, delta * factor, 0.0)
        together += torch.where(support & ~is_unique, delta, 0.0)
    return base + (alone + together / shared)
