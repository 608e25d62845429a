# SPDX-License-Identifier: Apache-2.0
"""DELLA: drop entries of each task vector at random, small ones more often, elect a sign, average those that agree.

DARE with a memory for size, and the election of TIES-Merging: for joining fine-tunes whose large changes should
survive.

Source:
    Deep, Bhardwaj, Poria: DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling,
    arXiv 2406.11617. Official code: declare-lab/della.

Equation:
    `q_i = rho - epsilon + 2 epsilon (r - 1) / (c - 1)`, `s_i = m_i (theta_i - theta_0) / q_i`, `m_i ~ Bernoulli(q_i)`,
    `v_i = w_i s_i`,
    `theta = theta_0 + lambda sum_{i: sign(v_i) = e} v_i / sum_{i: sign(v_i) = e} w_i`, `e = sign(sum_i v_i)`

    | symbol | name |
    |---|---|
    | theta_0 | `aligned`, the base of the task vectors |
    | theta_i | `tuned`, `tuned_2`, ... |
    | rho | `density`, the mean chance of an entry to be kept |
    | epsilon | `epsilon`, how far the chances of a row reach to both sides |
    | r, c | rank of an entry by magnitude in its row, 1 the smallest, and the length of the row |
    | w_i | `weight` |
    | lambda | `coefficient` |
    | e | the elected sign; `elect` says how, a tie is plus |

Differs from the official code:
    Masks are a function of seed, model, tensor and place, not of a global random stream. The authors give the width of
    the window of chances, which is twice `epsilon`. Rows run along the last axis, whatever the number of axes; of
    equal magnitudes the first counts as the smaller; in a row of one entry the chance is the density.

Cost:
    No passes over data; one read of each checkpoint and one write, and one read more for `rescale: l1`. Sorts each row.

Limits:
    Noise: two seeds give two models. `density - epsilon` and `density + epsilon` must lie inside (0, 1). No coefficient
    gives the tuned model back while the density is below 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace
from keelwright.ops.per_model import one_per_model
from keelwright.ops.philox import stream_key
from keelwright.ops.task_vectors import Rescale, add_merged, prune_by_rank, weigh
from keelwright.weights.edit import Edit, model_roles
from keelwright.weights.task_vectors import (
    ALIGNED,
    PerModel,
    TaskVectors,
    require_epsilons,
    require_task_vector_settings,
)


@dataclass(frozen=True, slots=True)
class DellaConfig:
    """Settings of DELLA."""

    coefficient: float = 1.0
    """Strength lambda of the merged task vector, any finite number. 0 returns the aligned model byte for byte. The
    authors use 1.1."""

    weight: PerModel = 1.0
    """Weight of each task vector, one number or one per tuned model."""

    density: PerModel = 0.7
    """Mean chance of an entry to be kept, in (0, 1], one number or one per tuned model; at 1 nothing is dropped. The
    authors' code drops 30 %."""

    epsilon: PerModel = 0.15
    """Chances of a row run from density - epsilon to density + epsilon, both inside (0, 1); 0 or more, one number or
    one per tuned model. 0 is DARE. The authors' example is 0.07."""

    normalize: bool = True
    """Divide each sum by the weights that took part."""

    rescale: Rescale = "inverse_keep"
    """What makes up for the dropped entries: `inverse_keep` divides each by its own chance (the paper), `l1` keeps the
    sum of magnitudes of each tensor, `none` does nothing."""

    elect: Literal["mass", "count"] = "mass"
    """Sign of the sum of the entries, or sign that more models have; a tie is plus."""

    seed: int = 0
    """Seed of the random masks, 0 or more. The mask of an entry depends on it, on the model's role, on the tensor's
    name and on the entry's place, and on nothing else."""

    def __post_init__(self) -> None:
        require_task_vector_settings(
            coefficient=self.coefficient,
            weight=self.weight,
            normalize=self.normalize,
            density=self.density,
            rescale=self.rescale,
        )
        require_epsilons(self.density, self.epsilon)
        require_choice("elect", self.elect, ("mass", "count"))
        require_in_range("seed", self.seed, low=0)


def della(
    base: Float[Tensor, "*shape"], tuned: Sequence[Float[Tensor, "*shape"]], config: DellaConfig, *, name: str = ""
) -> Float[Tensor, "*shape"]:
    """Return the merge of tensors in memory.

    Args:
        base: Weights of the common parent, float32 or float64.
        tuned: Weights of each tuned model, in the same dtype.
        config: All settings.
        name: The tensor's name, which is part of the key of its masks.
    """
    models = len(tuned)
    weights = one_per_model("weight", config.weight, models)
    densities = one_per_model("density", config.density, models)
    epsilons = one_per_model("epsilon", config.epsilon, models)
    columns = base.shape[-1] if base.ndim else 1
    deltas = [(one - base).reshape(-1, columns) for one in tuned]
    divide = config.rescale == "inverse_keep"
    kept = []
    for delta, density, epsilon, role in zip(deltas, densities, epsilons, model_roles(models), strict=True):
        key = stream_key(config.seed, role, name)
        kept.append(prune_by_rank(delta, density=density, epsilon=epsilon, key=key, offset=0, divide=divide))
    rescale: Rescale = "none" if divide else config.rescale
    vectors = [one.view(base.shape) for one in weigh(deltas, kept, weights, densities, rescale)]
    return add_merged(
        base, vectors, weights, coefficient=config.coefficient, elect=config.elect, normalize=config.normalize
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Della(TaskVectors, Edit):
    """DELLA as a weight edit."""

    config: DellaConfig = DellaConfig()
    models: int = 1

    config_class: ClassVar[type[DellaConfig]] = DellaConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=1.0, grid=(0.25, 0.5, 0.75, 1.0))

    def reach(self, name: str) -> Reach:
        """Return COPY where the settings come to one of the models, POINTWISE where nothing is dropped, else ROWS."""
        if self.copied() is not None:
            return Reach.COPY
        return Reach.POINTWISE if self.is_whole() else Reach.ROWS

    def sparse(self, role: str, chunk: Chunk, found: Found, scale: float) -> Tensor:
        """Return `scale` times what is kept of the rows of one task vector."""
        return prune_by_rank(
            self.delta(chunk, role),
            density=self.by_role("density")[role],
            epsilon=self.by_role("epsilon")[role],
            key=stream_key(self.config.seed, role, chunk.entry.name),
            offset=chunk.offset,
            divide=self.config.rescale == "inverse_keep",
            scale=scale,
        )

    def scale(self, role: str, found: Found) -> float:
        """Return the scale that keeps the sum of magnitudes; entries divided by their own chance need none."""
        return float(found["scales"][role]) if "scales" in found else 1.0

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the merged weights of the chunk."""
        config = self.config
        return add_merged(
            chunk.tensors[ALIGNED], self.vectors(chunk, found), self.weights(), coefficient=config.coefficient,
            elect=config.elect, normalize=config.normalize,
        )  # fmt: skip
