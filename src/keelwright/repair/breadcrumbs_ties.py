# SPDX-License-Identifier: Apache-2.0
"""Breadcrumbs with a sign election: drop both tails of each task vector, add up the entries that agree on a sign.

For joining several fine-tunes of which some changed a few weights wildly: the outliers go, the noise goes, and the
election of TIES-Merging settles the conflicts that are left.

Source:
    Davari, Belilovsky: Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks, arXiv 2312.06795,
    ECCV 2024. Official code: rezazzr/breadcrumbs.

Equation:
    `s_i = mid(theta_i - theta_0)`, `v_i = w_i s_i`, `e = sign(sum_i v_i)`,
    `theta = theta_0 + lambda sum_{i: sign(v_i) = e} v_i`, where mid drops the share
    `gamma` of the largest magnitudes of each tensor and keeps the next `rho`

    | symbol | name |
    |---|---|
    | theta_0 | `aligned`, the base of the task vectors |
    | theta_i | `tuned`, `tuned_2`, ... |
    | rho | `density`, the share of entries kept |
    | gamma | `gamma`, the share of the largest that go; the paper counts both tails from the bottom |
    | w_i | `weight` |
    | lambda | `coefficient` |
    | e | the elected sign; `elect` says how, a tie is plus |

Differs from the official code:
    The shares are counts, `trunc(rho n)` kept and `trunc(gamma n)` dropped at the top, met exactly; of equal magnitudes
    the lowest flat index counts as the larger. Where `gamma` is above `1 - rho` the density wins. Weights per model,
    `normalize` and `rescale` are options of merging programs. Reconstruction: the paper
    has no election; the combination is the merging programs', from a description of their behaviour. The count
    election is ours.

Cost:
    No passes over data. Three reads of each tensor for the exact thresholds, one more for `rescale: l1`, then one with
    the write.

Limits:
    The paper's shares were not read: the default of `gamma` is a merging program's, that of `density` is ours. No
    coefficient gives the tuned model back while the density is below 1. Float64 tensors are ordered by their float32
    values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.protocols import Chunk, Found, SearchSpace, TensorEntry
from keelwright.ops.per_model import one_per_model
from keelwright.ops.task_vectors import Rescale, add_merged, breadcrumb_counts, trim, weigh
from keelwright.weights.edit import Edit, model_roles
from keelwright.weights.task_vectors import (
    ALIGNED,
    PerModel,
    TaskVectors,
    as_tuple,
    require_task_vector_settings,
)
from keelwright.weights.threshold import CUT_PASSES, keep_band


@dataclass(frozen=True, slots=True)
class BreadcrumbsTiesConfig:
    """Settings of Breadcrumbs with a sign election."""

    coefficient: float = 1.0
    """Strength lambda of the merged task vector, any finite number. 0 returns the aligned model byte for byte."""

    weight: PerModel = 1.0
    """Weight of each task vector, one number or one per tuned model."""

    density: PerModel = 0.9
    """Share of entries kept, in (0, 1], one number or one per tuned model. At 1 nothing is dropped."""

    gamma: PerModel = 0.01
    """Share of the largest entries that are dropped, 0 to 1, one number or one per tuned model."""

    normalize: bool = False
    """Divide each sum by the weights that took part."""

    rescale: Rescale = "none"
    """What makes up for the dropped entries: `none`, `inverse_keep` (divide by the density) or `l1` (keep the sum of
    magnitudes of each tensor)."""

    elect: Literal["mass", "count"] = "mass"
    """Sign of the sum of the entries, or sign that more models have; a tie is plus."""

    def __post_init__(self) -> None:
        require_task_vector_settings(
            coefficient=self.coefficient,
            weight=self.weight,
            normalize=self.normalize,
            density=self.density,
            rescale=self.rescale,
        )
        for share in as_tuple(self.gamma):
            require_in_range("gamma", share, low=0.0, high=1.0)
        require_choice("elect", self.elect, ("mass", "count"))


def breadcrumbs_ties(
    base: Float[Tensor, "*shape"], tuned: Sequence[Float[Tensor, "*shape"]], config: BreadcrumbsTiesConfig
) -> Float[Tensor, "*shape"]:
    """Return the merge of tensors in memory.

    Args:
        base: Weights of the common parent, float32 or float64.
        tuned: Weights of each tuned model, in the same dtype.
        config: All settings.
    """
    weights = one_per_model("weight", config.weight, len(tuned))
    densities = one_per_model("density", config.density, len(tuned))
    gammas = one_per_model("gamma", config.gamma, len(tuned))
    deltas = [one - base for one in tuned]
    kept = []
    for delta, density, gamma in zip(deltas, densities, gammas, strict=True):
        dropped, count = breadcrumb_counts(delta.numel(), density=density, gamma=gamma)
        kept.append(trim(delta, count, dropped=dropped))
    vectors = weigh(deltas, kept, weights, densities, config.rescale)
    return add_merged(
        base, vectors, weights, coefficient=config.coefficient, elect=config.elect, normalize=config.normalize
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class BreadcrumbsTies(TaskVectors, Edit):
    """Breadcrumbs with a sign election as a weight edit."""

    config: BreadcrumbsTiesConfig = BreadcrumbsTiesConfig()
    models: int = 1

    config_class: ClassVar[type[BreadcrumbsTiesConfig]] = BreadcrumbsTiesConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=1.0, grid=(0.25, 0.5, 0.75, 1.0))

    def cut_passes(self) -> int:
        """Return the passes of exact thresholds."""
        return CUT_PASSES

    def cuts(self, entry: TensorEntry) -> dict[str, tuple[int, ...]]:
        """Return how many entries lie above the band that is kept, and how many above its lower end."""
        found = {}
        for role in model_roles(self.models):
            dropped, kept = self.counts(entry, role)
            found[role] = tuple(rank for rank in (dropped, dropped + kept) if 0 < rank < entry.elements)
        return found

    def sparse(self, role: str, chunk: Chunk, found: Found, scale: float) -> Tensor:
        """Return `scale` times the middle of one task vector."""
        dropped, kept = self.counts(chunk.entry, role)
        edges = found.get("edges", {})
        top, bottom = edges.get((role, dropped)), edges.get((role, dropped + kept))
        return keep_band(self.delta(chunk, role), offset=chunk.offset, top=top, bottom=bottom, scale=scale)

    def counts(self, entry: TensorEntry, role: str) -> tuple[int, int]:
        """Return how many of a tensor's largest entries are dropped, and how many of the next are kept."""
        density, gamma = self.by_role("density")[role], self.by_role("gamma")[role]
        return breadcrumb_counts(entry.elements, density=density, gamma=gamma)

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the merged weights of the chunk."""
        config = self.config
        return add_merged(
            chunk.tensors[ALIGNED], self.vectors(chunk, found), self.weights(), coefficient=config.coefficient,
            elect=config.elect, normalize=config.normalize,
        )  # fmt: skip
