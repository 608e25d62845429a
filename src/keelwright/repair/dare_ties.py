# SPDX-License-Identifier: Apache-2.0
"""DARE with a sign election: drop entries of each task vector at random, enlarge the rest, add up those that agree.

For joining several fine-tunes: dropping thins out where they conflict, and the election of TIES-Merging settles the
conflicts that are left.

Source:
    Yu, Yu, Yu, Huang, Li: Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch,
    arXiv 2311.03099, ICML 2024. Official code: yule-BUAA/MergeLM.

Equation:
    `s_i = m_i (theta_i - theta_0) / rho`, `m_i ~ Bernoulli(rho)`, `v_i = w_i s_i`, `e = sign(sum_i v_i)`,
    `theta = theta_0 + lambda sum_{i: sign(v_i) = e} v_i`

    | symbol | name |
    |---|---|
    | theta_0 | `aligned`, the base of the task vectors |
    | theta_i | `tuned`, `tuned_2`, ... |
    | rho | `density`, the chance of an entry to be kept |
    | w_i | `weight` |
    | lambda | `coefficient` |
    | e | the elected sign; `elect` says how, a tie is plus |

Differs from the official code:
    Masks are a function of seed, model, tensor and place, not of a global random stream, so no mask is the official
    one; their statistics are. Weights per model and `normalize` are options of merging programs, the
    count election is ours; the paper joins DARE with TIES-Merging, which trims and averages on top.
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
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_choice, require_in_range
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
class DareTiesConfig:
    """Settings of DARE with a sign election."""

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
        require_choice("elect", self.elect, ("mass", "count"))
        require_in_range("seed", self.seed, low=0)


def dare_ties(
    base: Float[Tensor, "*shape"], tuned: Sequence[Float[Tensor, "*shape"]], config: DareTiesConfig, *, name: str = ""
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
        base, vectors, weights, coefficient=config.coefficient, elect=config.elect, normalize=config.normalize
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class DareTies(TaskVectors, Edit):
    """DARE with a sign election as a weight edit."""

    config: DareTiesConfig = DareTiesConfig()
    models: int = 1

    config_class: ClassVar[type[DareTiesConfig]] = DareTiesConfig
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
            elect=config.elect, normalize=config.normalize,
        )  # fmt: skip
