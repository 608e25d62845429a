# SPDX-License-Identifier: Apache-2.0
"""TIES-Merging: trim each task vector to its largest entries, elect a sign per weight, add up those that agree.

For joining fine-tunes that pull the same weights in different directions. With a single tuned model it keeps only its
largest changes, which is a repair when the damage lies in many small ones.

Source:
    Yadav, Tam, Choshen, Raffel, Bansal: TIES-Merging: Resolving Interference When Merging Models, arXiv 2306.01708,
    NeurIPS 2023. Official code: prateeky2806/ties-merging (BSD-3-Clause).

Equation:
    `s_i = top_rho(theta_i - theta_0)`, `v_i = w_i s_i`, `e = sign(sum_i v_i)`,
    `theta = theta_0 + lambda sum_{i: sign(v_i) = e} v_i / sum_{i: sign(v_i) = e} w_i`

    | symbol | name |
    |---|---|
    | theta_0 | `aligned`, the base of the task vectors |
    | theta_i | `tuned`, `tuned_2`, ... |
    | rho | `density`, the share of entries kept |
    | w_i | `weight` |
    | e | the elected sign; `elect` says how, `zero_sign` what a tie is |
    | lambda | `coefficient` |

Differs from the official code:
    Trims each tensor by itself (`trim_scope: model` trims the whole task vector, as the official code does) and keeps
    exactly the whole part of `rho n` entries, where the official code keeps every entry that is not below the
    threshold. A tie of signs is plus (`zero_sign: majority` takes the sign that more entries of the whole model
    have, as the official code does; should that be a tie as well, plus). Weights per model, `rescale` and the count
    election are not in the paper.

Cost:
    No passes over data. Three reads of each tensor for the exact threshold, one more for `rescale: l1`, then one with
    the write. `trim_scope: model` reads the models twice more, `zero_sign: majority` up to five times.

Limits:
    With `normalize` the weights only choose between models: the strength of the whole is the coefficient. No
    coefficient gives the tuned model back while the density is below 1; coefficient 1 is nearest to it. Float64
    tensors are ordered by their float32 values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_choice
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace, Stats, TensorEntry, WeightEdit
from keelwright.ops.order_statistics import kept_count
from keelwright.ops.per_model import one_per_model
from keelwright.ops.task_vectors import Rescale, add_merged, trim, weigh
from keelwright.weights.edit import Edit, model_roles
from keelwright.weights.model_scope import Counted, MagnitudeSurvey, find_bins, share_out
from keelwright.weights.task_vectors import (
    ALIGNED,
    PerModel,
    TaskVectors,
    require_task_vector_settings,
)
from keelwright.weights.threshold import CUT_PASSES, keep_largest


@dataclass(frozen=True, slots=True)
class TiesConfig:
    """Settings of TIES-Merging."""

    coefficient: float = 1.0
    """Strength lambda of the merged task vector, any finite number. 0 returns the aligned model byte for byte. The
    paper's value without validation data is 1."""

    weight: PerModel = 1.0
    """Weight of each task vector, one number or one per tuned model."""

    density: PerModel = 0.2
    """Share of entries kept, in (0, 1], one number or one per tuned model. The paper keeps the top 20 %."""

    normalize: bool = True
    """Divide each sum by the weights that took part: a mean of the entries that agree, as in the paper."""

    rescale: Rescale = "none"
    """What makes up for the trimmed entries: `none` (the paper), `inverse_keep` (divide by the density) or `l1` (keep
    the sum of magnitudes of each task vector)."""

    elect: Literal["mass", "count"] = "mass"
    """Sign of the sum of the entries (the paper), or sign that more models have."""

    zero_sign: Literal["plus", "majority"] = "plus"
    """Sign where the election is a tie: plus, or that of most entries of the whole model (the official code)."""

    trim_scope: Literal["tensor", "model"] = "tensor"
    """Keep the largest entries of each tensor, or of the whole task vector (the paper)."""

    def __post_init__(self) -> None:
        require_task_vector_settings(
            coefficient=self.coefficient,
            weight=self.weight,
            normalize=self.normalize,
            density=self.density,
            rescale=self.rescale,
        )
        require_choice("elect", self.elect, ("mass", "count"))
        require_choice("zero_sign", self.zero_sign, ("plus", "majority"))
        require_choice("trim_scope", self.trim_scope, ("tensor", "model"))


def ties(
    base: Float[Tensor, "*shape"], tuned: Sequence[Float[Tensor, "*shape"]], config: TiesConfig
) -> Float[Tensor, "*shape"]:
    """Return the TIES merge of tensors in memory, taken as the whole model.

    Args:
        base: Weights of the common parent, float32 or float64.
        tuned: Weights of each tuned model, in the same dtype.
        config: All settings; both scopes are the same here.
    """
    weights = one_per_model("weight", config.weight, len(tuned))
    densities = one_per_model("density", config.density, len(tuned))
    deltas = [one - base for one in tuned]
    trimmed = [trim(one, kept_count(density, one.numel())) for one, density in zip(deltas, densities, strict=True)]
    vectors = weigh(deltas, trimmed, weights, densities, config.rescale)
    is_plus = config.zero_sign == "plus" or sign_balance(vectors, config.elect) >= 0
    return add_merged(
        base, vectors, weights, coefficient=config.coefficient, elect=config.elect, normalize=config.normalize,
        zero_is_plus=is_plus,
    )  # fmt: skip


def sign_balance(vectors: Sequence[Float[Tensor, "*shape"]], elect: Literal["mass", "count"]) -> int:
    """Return how many entries are elected plus, less how many are elected minus; ties count as neither."""
    balance = sum(vector if elect == "mass" else vector.sign() for vector in vectors)
    return int(balance.sign().sum()) if isinstance(balance, Tensor) else 0


@dataclass(frozen=True, slots=True)
class Ties(TaskVectors, Edit):
    """TIES-Merging as a weight edit."""

    config: TiesConfig = TiesConfig()
    models: int = 1
    counted: Counted | None = field(default=None, repr=False, compare=False)
    """First half of what the model-wide threshold needs."""
    kept: Mapping[str, Mapping[str, int]] | None = field(default=None, repr=False, compare=False)
    """Entries kept per tensor and role, once a model-wide threshold is known."""
    zero_is_plus: bool | None = field(default=None, repr=False, compare=False)
    """Sign of a tie, once the model's majority is known."""

    config_class: ClassVar[type[TiesConfig]] = TiesConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=1.0, grid=(0.25, 0.5, 0.75, 1.0))

    def cut_passes(self) -> int:
        """Return the passes of an exact threshold."""
        return CUT_PASSES

    def cuts(self, entry: TensorEntry) -> dict[str, tuple[int, ...]]:
        """Return the number of entries kept of each task vector, where that is neither none nor all."""
        counts = {role: self.kept_of(entry, role) for role in model_roles(self.models)}
        return {role: (count,) if 0 < count < entry.elements else () for role, count in counts.items()}

    def sparse(self, role: str, chunk: Chunk, found: Found, scale: float) -> Tensor:
        """Return `scale` times the largest entries of one task vector."""
        kept = self.kept_of(chunk.entry, role)
        edge = found["edges"].get((role, kept)) if "edges" in found else None
        delta = self.delta(chunk, role)
        return keep_largest(
            delta, offset=chunk.offset, elements=chunk.entry.elements, rank=kept, edge=edge, scale=scale
        )

    def kept_of(self, entry: TensorEntry, role: str) -> int:
        """Return how many entries of a tensor's task vector are kept."""
        if self.kept is not None:
            return self.kept[entry.name][role]
        return kept_count(self.by_role("density")[role], entry.elements)

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the merged weights of the chunk."""
        config = self.config
        return add_merged(
            chunk.tensors[ALIGNED], self.vectors(chunk, found), self.weights(), coefficient=config.coefficient,
            elect=config.elect, normalize=config.normalize, zero_is_plus=self.zero_is_plus is not False,
        )  # fmt: skip

    def survey(self) -> WeightEdit | None:
        """Return what the model-wide settings ask next."""
        if self.copied() is not None:
            return None
        if self.config.trim_scope == "model" and self.kept is None and not self.is_whole():
            bins = None if self.counted is None else {role: one[0] for role, one in self.counted.bins.items()}
            return MagnitudeSurvey(self.roles(), bins)
        return SignSurvey(self) if self.config.zero_sign == "majority" and self.zero_is_plus is None else None

    def surveyed(self, found: Mapping[str, Found]) -> Ties:
        """Return the edit that knows what the survey came to."""
        if not isinstance(self.survey(), MagnitudeSurvey):
            return replace(self, zero_is_plus=sum(one.get("signs", 0) for one in found.values()) >= 0)
        if self.counted is None:
            return replace(self, counted=find_bins(found, self.by_role("density")))
        return replace(self, counted=None, kept=share_out(self.counted, found))


@dataclass(frozen=True, slots=True)
class SignSurvey(Edit):
    """Counts the elected signs of the whole model."""

    of: Ties

    def roles(self) -> tuple[str, ...]:
        """Return the roles of the edit that asks."""
        return self.of.roles()

    def reach(self, name: str) -> Reach:
        """Return REDUCED."""
        return Reach.REDUCED

    def passes(self, name: str) -> int:
        """Return one pass more than the edit needs itself."""
        return self.of.passes(name) + 1

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return what the edit reduces, then the balance of signs."""
        if found.get("passed", 0) < self.of.passes(name):
            return self.of.reduce(name, chunk, found)
        return {"signs": sign_balance(self.of.vectors(chunk, found), self.of.config.elect)}

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """Return what the edit settles, then the balance of signs."""
        passed = found.get("passed", 0)
        done = sums if passed == self.of.passes(entry.name) else self.of.settle(entry, sums, found)
        return {**done, "passed": passed + 1}
