# SPDX-License-Identifier: Apache-2.0
"""Arcee fusion: take over the few changes that stand out, and leave the rest of the aligned model as it is.

A change stands out when its importance, its size times how much it shifts its row's distribution, lies far above the
middle half of its tensor. As a repair it keeps the large changes of tuning and gives every small one back.

Source:
    No paper; the behaviour of mergekit 0.1.5, method `arcee_fusion`, from a description of it.

Equation:
    `I = |x - b| KL(softmax(x_row) + 1e-8, softmax(b_row) + 1e-8)`,
    `t = median(I) + 1.5 (Q3(I) - Q1(I))`; `theta = x` where `I >= t`, else `b`

    | symbol | name |
    |---|---|
    | b | `aligned` |
    | x | `tuned` |
    | quartiles | `sorted(I)[trunc(q (n - 1))]`, exact |

Differs from the official code:
    Reconstruction: there is no paper, and the description leaves open what happens where all importances are equal;
    here nothing stands out then and the aligned weights stay. Quartiles are exact at every size, where the program
    samples a million values of larger tensors; divergences are taken in float64, because rounding in float32 drowns
    those of a light fine-tune. `coefficient` is ours: the strength of the changes that are taken over.

Cost:
    No passes over data; three reads of each tensor and one write, two exponentials per weight.

Limits:
    A vector has a single row, so only the size of its changes counts. Rows of one entry have no divergence and stay. No
    coefficient gives the tuned model back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace, Stats, TensorEntry
from keelwright.ops.combine import weighted_sum
from keelwright.ops.order_statistics import value_of
from keelwright.weights.edit import Edit
from keelwright.weights.task_vectors import ALIGNED
from keelwright.weights.threshold import reduce_cuts, settle_cuts

_TUNED = "tuned"
_IMPORTANCE = "importance"
_FLOOR = 1e-8
_SPREADS = 1.5


@dataclass(frozen=True, slots=True)
class ArceeFusionConfig:
    """Settings of Arcee fusion."""

    coefficient: float = 1.0
    """Strength of the changes that are taken over, 0 to 1. 0 returns the aligned model byte for byte, 1 takes them as
    they are, as the published method does."""

    def __post_init__(self) -> None:
        require_in_range("coefficient", self.coefficient, low=0.0, high=1.0)


def divergences(aligned: Float[Tensor, "rows columns"], tuned: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
    """Return the Kullback-Leibler divergence of each row's softmax from the aligned row's, in nats, in float64."""
    after = tuned.double().softmax(-1).add_(_FLOOR)
    before = aligned.double().softmax(-1).add_(_FLOOR)
    return (after * (after / before).log()).sum(-1).clamp_min(0.0)


def importance(
    aligned: Float[Tensor, "rows columns"], tuned: Float[Tensor, "rows columns"], shifts: Float[Tensor, " rows"]
) -> Float[Tensor, "rows columns"]:
    """Return the size of each change times its row's divergence, in float32."""
    return ((tuned - aligned).abs().double() * shifts[:, None]).float()


def quartile_ranks(elements: int) -> tuple[int, int, int]:
    """Return the places of the quartiles, counted from the largest value, which is 1."""
    first, second, third = (elements - int(share * (elements - 1)) for share in (0.25, 0.5, 0.75))
    return first, second, third


def fuse(
    aligned: Float[Tensor, "*shape"],
    tuned: Float[Tensor, "*shape"],
    stands_out: Bool[Tensor, "*shape"],
    *,
    coefficient: float,
) -> Float[Tensor, "*shape"]:
    """Return the aligned weights, and where a change stands out that share of the change on top of them."""
    if coefficient == 1.0:
        return torch.where(stands_out, tuned, aligned)
    mixed = weighted_sum((aligned, tuned), (1.0 - coefficient, coefficient), keep_equal=True)
    return torch.where(stands_out, mixed, aligned)


def arcee_fusion(
    aligned: Float[Tensor, "*shape"], tuned: Float[Tensor, "*shape"], config: ArceeFusionConfig
) -> Float[Tensor, "*shape"]:
    """Return the fusion of tensors in memory.

    Args:
        aligned: Weights before tuning, float32 or float64.
        tuned: Weights after it, in the same dtype.
        config: The strength.
    """
    columns = aligned.shape[-1] if aligned.ndim else 1
    before, after = aligned.reshape(-1, columns), tuned.reshape(-1, columns)
    weight = importance(before, after, divergences(before, after))
    ordered = weight.flatten().sort(descending=True).values
    first, second, third = (float(ordered[rank - 1]) for rank in quartile_ranks(ordered.numel()))
    if bool(ordered[0] == ordered[-1]):
        return aligned
    stands_out = weight.double() >= second + _SPREADS * (third - first)
    return fuse(aligned, tuned, stands_out.view(aligned.shape), coefficient=config.coefficient)


@dataclass(frozen=True, slots=True)
class ArceeFusion(Edit):
    """Arcee fusion as a weight edit."""

    config: ArceeFusionConfig = ArceeFusionConfig()

    config_class: ClassVar[type[ArceeFusionConfig]] = ArceeFusionConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=1.0, grid=(0.5, 1.0))

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return (ALIGNED, _TUNED)

    def reach(self, name: str) -> Reach:
        """Return COPY at coefficient 0, else ROWS."""
        return Reach.COPY if self.config.coefficient == 0.0 else Reach.ROWS

    def copies(self, name: str) -> str:
        """Return the aligned model: without strength nothing is taken over."""
        return ALIGNED

    def passes(self, name: str) -> int:
        """Return two: the quartiles' bins, and the quartiles."""
        return 2

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return the divergence of each row and histograms of the importances."""
        aligned, tuned = chunk.tensors[ALIGNED], chunk.tensors[_TUNED]
        ranks = {_IMPORTANCE: quartile_ranks(chunk.entry.elements)}
        if "bins" in found:
            return reduce_cuts(lambda _: self._importance(chunk, found), ranks, chunk, found)
        shifts = divergences(aligned, tuned)
        stats = reduce_cuts(lambda _: importance(aligned, tuned, shifts), ranks, chunk, found)
        return {**stats, f"shifts {chunk.offset}": shifts}

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """Return the divergences and the quartiles' bins, then the threshold."""
        ranks = {_IMPORTANCE: quartile_ranks(entry.elements)}
        if entry.elements == 0:
            return {"threshold": None}
        if "bins" not in found:
            offsets = sorted(int(key.removeprefix("shifts ")) for key in sums if key.startswith("shifts "))
            shifts = torch.cat([sums[f"shifts {offset}"] for offset in offsets])
            return {**settle_cuts(ranks, entry, sums, found), "shifts": shifts}
        done = settle_cuts(ranks, entry, sums, found)
        cuts = {rank: one[0] for (_, rank), one in done["open"].items()}
        cuts |= {rank: edge.cut for (_, rank), edge in done["closed"].items()}
        first, second, third = (value_of(cuts[rank]) for rank in ranks[_IMPORTANCE])
        are_equal = cuts[ranks[_IMPORTANCE][1]].equal == entry.elements
        return {"threshold": None if are_equal else second + _SPREADS * (third - first)}

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the fused weights of the chunk."""
        aligned, tuned = chunk.tensors[ALIGNED], chunk.tensors[_TUNED]
        if found["threshold"] is None:
            return aligned.clone()
        stands_out = self._importance(chunk, found).double() >= found["threshold"]
        return fuse(aligned, tuned, stands_out, coefficient=self.config.coefficient)

    def shares(self) -> Hashable:
        """Return everything but the coefficient: it does not enter the reductions."""
        return None if self.config.coefficient == 0.0 else dataclasses.replace(self.config, coefficient=1.0)

    def _importance(self, chunk: Chunk, found: Found) -> Tensor:
        aligned = chunk.tensors[ALIGNED]
        first = chunk.offset // aligned.shape[-1]
        return importance(aligned, chunk.tensors[_TUNED], found["shifts"][first : first + aligned.shape[0]])
