# SPDX-License-Identifier: Apache-2.0
"""DARE: drop entries of each task vector at random, enlarge the rest in proportion, add them to the base.

Task vectors of a light fine-tune are redundant: most entries can go without loss to the task, and what is left of
several models conflicts less. As a repair it thins out what tuning changed.

Source:
    Yu, Yu, Yu, Huang, Li: Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch,
    arXiv 2311.03099, ICML 2024. Official code: yule-BUAA/MergeLM.

Equation:
    `s_i = m_i (theta_i - theta_0) / (1 - p)`, `m_i ~ Bernoulli(1 - p)`, `theta = theta_0 + lambda sum_i w_i s_i`

    | symbol | name |
    |---|---|
    | theta_0 | `aligned`, the base of the task vectors |
    | theta_i | `tuned`, `tuned_2`, ... |
    | 1 - p | `density`, the chance of an entry to be kept |
    | w_i | `weight` |
    | lambda | `coefficient` |

Differs from the official code:
    Masks are a function of seed, model, tensor and place, not of a global random stream, so no mask is the official
    one; their statistics are. Weights per model and `normalize` are options of merging programs.
    `rescale: l1` is the merging programs' own reading: it keeps the sum of magnitudes, and is unbiased only for large
    tensors without dominant entries.

Cost:
    No passes over data; one read of each checkpoint and one write, and one read more for `rescale: l1`.

Limits:
    Noise: two seeds give two models, and the fewer entries are kept the more they differ. Large deltas (more than
    light tuning) do not survive a low density. No coefficient gives the tuned model back while the density is below 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.protocols import Chunk, Found, SearchSpace
from keelwright.ops.per_model import one_per_model
from keelwright.ops.philox import keep_randomly, stream_key
from keelwright.ops.task_vectors import Rescale, add_merged, weigh
from keelwright.weights.edit import Edit, model_roles
from keelwright.weights.task_vectors import (
    ALIGNED,
    PerModel,
    TaskVectors,
    require_task_vector_settings,
)


@dataclass(frozen=True, slots=True)
class DareLinearConfig:
    """Settings of DARE."""

    coefficient: float = 1.0
    """Strength lambda of the merged task vector, any finite number. 0 returns the aligned model byte for byte."""

    weight: PerModel = 1.0
    """Weight of each task vector, one number or one per tuned model."""

    density: PerModel = 0.5
    """Chance of an entry to be kept, in (0, 1], one number or one per tuned model. The paper drops up to
    99 %."""

    normalize: bool = False
    """Divide each sum by the weights that took part."""

    rescale: Rescale = "inverse_keep"
    """What makes up for the dropped entries: `inverse_keep` divides by the density (the paper), `l1` keeps the sum of
    magnitudes of each tensor, `none` does nothing."""

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
        require_in_range("seed", self.seed, low=0)


def dare_linear(
    base: Float[Tensor, "*shape"], tuned: Sequence[Float[Tensor, "*shape"]], config: DareLinearConfig, *, name: str = ""
) -> Float[Tensor, "*shape"]:
    """Return the merge of tensors in memory.

    Args:
        base: Weights of the common parent, float32 or float64.
        tuned: Weights of each tuned model, in the same dtype.
        config: All settings.
        name: The tensor's name, which is part of the key of its masks.
    """
    weights = one_per_model("weight", config.weight, len(tuned))
    densities = one_per_model("density", config.density, len(tuned))
    deltas = [(one - base).flatten() for one in tuned]
    keys = [stream_key(config.seed, role, name) for role in model_roles(len(tuned))]
    kept = [
        keep_randomly(delta, probability=density, key=key, offset=0)
        for delta, density, key in zip(deltas, densities, keys, strict=True)
    ]
    vectors = [one.view(base.shape) for one in weigh(deltas, kept, weights, densities, config.rescale)]
    return add_merged(
        base, vectors, weights, coefficient=config.coefficient, normalize=config.normalize
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class DareLinear(TaskVectors, Edit):
    """DARE as a weight edit."""

    config: DareLinearConfig = DareLinearConfig()
    models: int = 1

    config_class: ClassVar[type[DareLinearConfig]] = DareLinearConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=1.0, grid=(0.25, 0.5, 0.75, 1.0))

    def sparse(self, role: str, chunk: Chunk, found: Found, scale: float) -> Tensor:
        """Return `scale` times a random part of one task vector."""
        key = stream_key(self.config.seed, role, chunk.entry.name)
        density = self.by_role("density")[role]
        return keep_randomly(self.delta(chunk, role), probability=density, key=key, offset=chunk.offset, scale=scale)

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the merged weights of the chunk."""
        config = self.config
        return add_merged(
            chunk.tensors[ALIGNED], self.vectors(chunk, found), self.weights(), coefficient=config.coefficient,
            normalize=config.normalize,
        )  # fmt: skip
