# SPDX-License-Identifier: Apache-2.0
"""What the edits of the task-vector family have in common: roles, per-model settings, the ends that are copies."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any, ClassVar

from torch import Tensor

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Chunk, Found, Reach, Stats, TensorEntry
from keelwright.ops.per_model import one_per_model, require_models, require_numbers
from keelwright.ops.task_vectors import RESCALES, l1_scale, magnitude_sum
from keelwright.weights.edit import model_roles, tuned_roles
from keelwright.weights.threshold import Ranks, cuts_are_known, open_span, reduce_cuts, settle_cuts

ALIGNED = "aligned"
PerModel = float | tuple[float, ...]
"""One number for every tuned model, or one for each in the order in which they were given."""


def as_tuple(value: PerModel) -> tuple[float, ...]:
    """Return the numbers of a per-model setting."""
    return value if isinstance(value, tuple) else (value,)


def require_task_vector_settings(
    *, coefficient: float, weight: PerModel, normalize: bool, density: PerModel = 1.0, rescale: str = "none"
) -> None:
    """Raise `ConfigError` unless the settings that the whole family shares make sense.

    Args:
        coefficient: Any finite number.
        weight: Finite; none below 0 when the weights are divided out again, where a negative one would add.
        normalize: Whether they are.
        density: In (0, 1].
        rescale: One of `none`, `inverse_keep`, `l1`.
    """
    require_numbers("coefficient", coefficient)
    require_numbers("weight", weight)
    for share in as_tuple(density):
        require_in_range("density", share, low=0.0, high=1.0, low_open=True)
    require_choice("rescale", rescale, RESCALES)
    if normalize and min(as_tuple(weight), default=0.0) < 0.0:
        raise ConfigError(
            "A negative weight cannot be normalised: it would add the task vector instead of subtracting it.",
            expected="weights of 0 or more, or normalize false",
            found=f"weight {weight} with normalize true",
            fix="set normalize to false; the strength of the whole is the coefficient",
        )


def require_epsilons(density: PerModel, epsilon: PerModel) -> None:
    """Raise `ConfigError` unless the chances around every density below 1 lie inside (0, 1).

    Args:
        density: Mean chances, one number or one per model.
        epsilon: How far the chances reach to both sides, 0 or more.
    """
    shares, reaches = as_tuple(density), as_tuple(epsilon)
    count = max(len(shares), len(reaches))
    shares = shares * count if len(shares) == 1 else shares
    reaches = reaches * count if len(reaches) == 1 else reaches
    for share, reach in zip(shares, reaches, strict=False):
        require_in_range("epsilon", reach, low=0.0, high=1.0)
        if share < 1.0 and not (share > reach and share + reach < 1.0):
            raise ConfigError(
                "The chances to be kept leave the range of a probability.",
                expected="0 < density - epsilon and density + epsilon < 1",
                found=f"density {share:g}, epsilon {reach:g}",
                fix=f"set 'epsilon' below {min(share, 1.0 - share):g}",
            )


class TaskVectors:
    """What an edit of the family is besides an `Edit`: list it first among the bases of a frozen dataclass.

    The dataclass has `models` and a `config` with `coefficient`, `weight` and `normalize`; where entries are dropped
    also `density` and `rescale`. It says what is dropped in `sparse`, and in `cuts` where that takes thresholds.
    """

    __slots__ = ()

    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None

    @property
    def config(self) -> Any:
        """Return the settings."""
        raise NotImplementedError

    @property
    def models(self) -> int:
        """Return the number of tuned models."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        """Check that every per-model setting fits the number of models."""
        method = type(self).__module__.rpartition(".")[2]
        require_models(method, self.models, least=self.min_models, most=self.max_models)
        for name in ("weight", "density", "gamma", "epsilon"):
            if hasattr(self.config, name):
                one_per_model(name, getattr(self.config, name), self.models)

    def roles(self) -> tuple[str, ...]:
        """Return the base and the tuned models, the first of which lays out the output."""
        return (ALIGNED, *tuned_roles(self.models))

    def weights(self) -> tuple[float, ...]:
        """Return the weight of each tuned model, in the order given."""
        return one_per_model("weight", self.config.weight, self.models)

    def by_role(self, name: str, default: float = 1.0) -> dict[str, float]:
        """Return a per-model setting by role, in the order given."""
        values = one_per_model(name, getattr(self.config, name, default), self.models)
        return dict(zip(model_roles(self.models), values, strict=True))

    def is_whole(self) -> bool:
        """Tell whether nothing is dropped from any task vector."""
        return min(self.by_role("density").values()) >= 1.0

    def copied(self) -> str | None:
        """Return the role that the settings come to, byte for byte, or None."""
        if self.config.coefficient == 0.0:
            return ALIGNED
        weight = self.weights()[0]
        strength = self.config.coefficient * (1.0 if self.config.normalize else weight)
        is_tuned = self.models == 1 and self.is_whole() and strength == 1.0 and weight != 0.0
        return self.roles()[-1] if is_tuned else None

    def copies(self, name: str) -> str:
        """Return the role that the settings come to."""
        return self.copied() or self.roles()[-1]

    def reach(self, name: str) -> Reach:
        """Return COPY where the settings come to one of the models, REDUCED where entries must be looked at first."""
        if self.copied() is not None:
            return Reach.COPY
        return Reach.REDUCED if self.passes(name) else Reach.POINTWISE

    def shares(self) -> Hashable:
        """Return everything but the coefficient: it does not enter the reductions."""
        if self.copied() is not None:
            return None  # nothing is reduced
        return self.models, dataclasses.replace(self.config, coefficient=1.0)

    def delta(self, chunk: Chunk, role: str) -> Tensor:
        """Return the task vector of one model in a chunk."""
        return chunk.tensors[role] - chunk.tensors[ALIGNED]

    def sparse(self, role: str, chunk: Chunk, found: Found, scale: float) -> Tensor:
        """Return `scale` times what is kept of one task vector."""
        return self.delta(chunk, role).mul_(scale)

    def cuts(self, entry: TensorEntry) -> Ranks:
        """Return the thresholds that `sparse` needs of a tensor."""
        return {}

    def cut_passes(self) -> int:
        """Return how many passes the thresholds take."""
        return 0

    def scale(self, role: str, found: Found) -> float:
        """Return what makes up for the dropped entries of a task vector."""
        if "scales" in found:
            return float(found["scales"][role])
        return 1.0 / self.by_role("density")[role] if getattr(self.config, "rescale", "none") == "inverse_keep" else 1.0

    def vectors(self, chunk: Chunk, found: Found) -> list[Tensor]:
        """Return what is kept of each task vector, rescaled and times its weight, in the order given."""
        return [
            self.sparse(role, chunk, found, weight * self.scale(role, found))
            for role, weight in zip(model_roles(self.models), self.weights(), strict=True)
        ]

    def passes(self, name: str) -> int:
        """Return the passes of the thresholds, and one for the sums of magnitudes."""
        if self.is_whole():
            return 0
        return self.cut_passes() + int(getattr(self.config, "rescale", "none") == "l1")

    def span(self, entry: TensorEntry, found: Found) -> tuple[int, int]:
        """Return the part of the tensor that the thresholds still depend on."""
        return open_span(entry, found) if self.cut_passes() else (0, entry.elements)

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return what the thresholds need, then the sums of magnitudes."""
        if self.cut_passes() and not cuts_are_known(found):
            return reduce_cuts(lambda role: self.delta(chunk, role), self.cuts(chunk.entry), chunk, found)
        stats = {}
        for role in model_roles(self.models):
            stats[f"all {role}"] = magnitude_sum(self.delta(chunk, role))
            stats[f"kept {role}"] = magnitude_sum(self.sparse(role, chunk, found, 1.0))
        return stats

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """Return the cuts, pass by pass, then the scales."""
        if self.cut_passes() and not cuts_are_known(found):
            return settle_cuts(self.cuts(entry), entry, sums, found)
        roles = model_roles(self.models)
        return {"scales": {r: l1_scale(sums.get(f"all {r}", 0.0), sums.get(f"kept {r}", 0.0)) for r in roles}}
