# SPDX-License-Identifier: Apache-2.0
"""SCE: select the weights on which the models differ most, weigh each model by its change, erase the minority's signs.

For joining several fine-tunes without choosing weights: what each model changed decides how much it counts.

Source:
    Wan, Zhong, Yang, Chen, Quan: FuseChat: Knowledge Fusion of Chat Models, arXiv 2408.07990, EMNLP 2025; the merging
    step (select, calculate, erase).

Equation:
    `d_i = theta_i - theta_0`; keep the entries whose variance over i is among the highest, zero the rest;
    `w_i = mean(d_i^2) / sum_j mean(d_j^2)`; `e = sign(sum_i d_i)`, `A_i = [sign(d_i) = e]`;
    `theta = theta_0 + sum_i A_i w_i d_i / sum_i A_i w_i`

    | symbol | name |
    |---|---|
    | theta_0 | `aligned`, the base of the task vectors |
    | theta_i | `tuned`, `tuned_2`, ... |
    | share of entries selected | `select_topk`, of those that vary at all |

Differs from the official code:
    Not compared with it. The most common merging program gives every model the same weight when the sum of mean
    squares is below 1e-6, which that of ordinary fine-tunes is, and does not divide by less than 1e-6: `legacy` does
    the same, without it equal weights serve only where nothing changed. Of equal variances the lowest flat index is
    selected first; a sum of signs of zero is plus.

Cost:
    No passes over data. One read of each tensor for the weights, three more for the selection, then one with the write.

Limits:
    No strength: no setting leads from the aligned model to a tuned one, so `heal` does not search it. Of one tuned
    model alone it returns that model, or with a selection the aligned one, because nothing varies.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace, Stats, TensorEntry
from keelwright.ops.per_model import require_models
from keelwright.ops.task_vectors import trim
from keelwright.weights.edit import Edit, model_roles, tuned_roles
from keelwright.weights.task_vectors import ALIGNED
from keelwright.weights.threshold import CUT_PASSES, cuts_are_known, keep_largest, reduce_cuts, settle_cuts

_VARIANCE = "variance"
_LEGACY_FLOOR = 1e-6


@dataclass(frozen=True, slots=True)
class SceConfig:
    """Settings of SCE."""

    select_topk: float = 1.0
    """Share of the entries with any variance that are selected, 0 to 1; 1 selects all entries, 0 none."""

    legacy: bool = False
    """Weigh the models equally when their mean squares add up to less than 1e-6, and divide by no less than that."""

    def __post_init__(self) -> None:
        require_in_range("select_topk", self.select_topk, low=0.0, high=1.0)


def variance(deltas: Sequence[Float[Tensor, "*shape"]]) -> Float[Tensor, "*shape"]:
    """Return the variance of each entry over the models, divided by their number."""
    mean = torch.zeros_like(deltas[0])
    for delta in deltas:
        mean += delta
    mean /= len(deltas)
    total = torch.zeros_like(mean)
    for delta in deltas:
        total += (delta - mean).square_()
    return total.div_(len(deltas))


def model_weights(squares: Sequence[float], elements: int, *, legacy: bool) -> list[float]:
    """Return each model's share of the sum of squared changes; equal shares where nothing changed.

    Args:
        squares: Sum of squares of each task vector.
        elements: Size of the tensor.
        legacy: Equal shares already when the mean squares add up to less than 1e-6.
    """
    total = sum(squares)
    if total == 0.0 or (legacy and total / max(1, elements) < _LEGACY_FLOOR):
        return [1.0 / len(squares)] * len(squares)
    return [one / total for one in squares]


def erase(
    deltas: Sequence[Float[Tensor, "*shape"]], weights: Sequence[float], *, legacy: bool
) -> Float[Tensor, "*shape"]:
    """Return the weighted mean of the entries that have the sign of their unweighted sum; 0 where there is none.

    Args:
        deltas: Task vectors.
        weights: One per model, 0 or more.
        legacy: Divide by no less than 1e-6.
    """
    mass = torch.zeros_like(deltas[0])
    for delta in deltas:
        mass += delta
    merged, share = torch.zeros_like(mass), torch.zeros_like(mass)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = torch.where(mass >= 0.0, delta > 0.0, delta < 0.0)
        merged += torch.where(agrees, delta * weight, 0.0)
        share += agrees * weight
    if legacy:
        return merged / share.clamp_min(_LEGACY_FLOOR)
    return merged / torch.where(share == 0.0, 1.0, share)


def sce(
    base: Float[Tensor, "*shape"], tuned: Sequence[Float[Tensor, "*shape"]], config: SceConfig
) -> Float[Tensor, "*shape"]:
    """Return the merge of tensors in memory.

    Args:
        base: Weights of the common parent, float32 or float64.
        tuned: Weights of each tuned model, in the same dtype.
        config: All settings.
    """
    deltas = [one - base for one in tuned]
    if config.select_topk < 1.0:
        spread = variance(deltas)
        is_kept = trim(spread, int(int(spread.count_nonzero()) * config.select_topk)) > 0.0
        deltas = [torch.where(is_kept, delta, 0.0) for delta in deltas]
    squares = [float(delta.double().square().sum()) for delta in deltas]
    weights = model_weights(squares, base.numel(), legacy=config.legacy)
    return base + erase(deltas, weights, legacy=config.legacy)


@dataclass(frozen=True, slots=True)
class Sce(Edit):
    """SCE as a weight edit."""

    config: SceConfig = SceConfig()
    models: int = 2

    config_class: ClassVar[type[SceConfig]] = SceConfig
    search_space: ClassVar[SearchSpace | None] = None
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        require_models("sce", self.models, least=self.min_models, most=self.max_models)

    def roles(self) -> tuple[str, ...]:
        """Return the base and the tuned models, the first of which lays out the output."""
        return (ALIGNED, *tuned_roles(self.models))

    def reach(self, name: str) -> Reach:
        """Return COPY for a single model, whose entries do not vary; else REDUCED."""
        return Reach.COPY if self.models == 1 else Reach.REDUCED

    def copies(self, name: str) -> str:
        """Return what one model comes to: itself, or the base where a selection finds no variance."""
        return self.roles()[-1] if self.config.select_topk >= 1.0 else ALIGNED

    def passes(self, name: str) -> int:
        """Return the passes of the selection, and one for the weights."""
        return 1 + (CUT_PASSES if self.config.select_topk < 1.0 else 0)

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return what the selection needs, then the sums of squares of what was selected."""
        if self.config.select_topk < 1.0 and not cuts_are_known(found):
            deltas = self._deltas(chunk)
            spread = variance(deltas).float()
            stats = reduce_cuts(lambda _: spread, self._ranks(found), chunk, found)
            return stats if "bins" in found else {**stats, "varies": int(spread.count_nonzero())}
        return {
            f"squares {role}": float(delta.double().square().sum())
            for role, delta in zip(model_roles(self.models), self._selected(chunk, found), strict=True)
        }

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """Return the cut, pass by pass, then the weights of the models."""
        if self.config.select_topk < 1.0 and not cuts_are_known(found):
            selected = found.get("selected", int(sums.get("varies", 0) * self.config.select_topk))
            ranks = {_VARIANCE: (selected,) if selected else ()}
            return {**settle_cuts(ranks, entry, sums, found), "selected": selected}
        squares = [sums.get(f"squares {role}", 0.0) for role in model_roles(self.models)]
        return {"weights": model_weights(squares, entry.elements, legacy=self.config.legacy)}

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the merged weights of the chunk."""
        merged = erase(self._selected(chunk, found), found["weights"], legacy=self.config.legacy)
        return chunk.tensors[ALIGNED] + merged

    def shares(self) -> Hashable:
        """Return all settings."""
        return None if self.models == 1 else (self.models, self.config)

    def _ranks(self, found: Found) -> dict[str, tuple[int, ...]]:
        # Before the first pass nobody knows how many entries vary; any rank asks for the histogram.
        selected = found.get("selected", 1)
        return {_VARIANCE: (selected,) if selected else ()}

    def _deltas(self, chunk: Chunk) -> list[Tensor]:
        return [chunk.tensors[role] - chunk.tensors[ALIGNED] for role in model_roles(self.models)]

    def _selected(self, chunk: Chunk, found: Found) -> list[Tensor]:
        """Return the task vectors with zeros where nothing was selected."""
        deltas = self._deltas(chunk)
        if self.config.select_topk >= 1.0:
            return deltas
        kept = found["selected"]
        edge = found["edges"].get((_VARIANCE, kept))
        spread = variance(deltas).float()
        is_kept = keep_largest(spread, offset=chunk.offset, elements=chunk.entry.elements, rank=kept, edge=edge) > 0.0
        return [torch.where(is_kept, delta, 0.0) for delta in deltas]
