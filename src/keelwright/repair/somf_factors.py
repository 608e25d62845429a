# SPDX-License-Identifier: Apache-2.0
"""SOMF on the factors of LoRA adapters, as its official code has it: another method than masking their products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import TensorSource
from keelwright.models.adapters import AdaptedCheckpoint, LoraFactors
from keelwright.ops.concrete import rescaled
from keelwright.weights.virtual import Update

LEFT, RIGHT = "left", "right"

Combine = Callable[[Sequence[Tensor], Tensor | None], Tensor]
"""From task vectors and a gate to the fused vector."""


@dataclass(frozen=True, slots=True, repr=False)
class FactorTasks:
    """The factors of an aligned model's adapter (zero where it has none) and of the tuned models' adapters."""

    base: TensorSource
    """Below all adapters."""
    aligned: Mapping[str, LoraFactors]
    tuned: tuple[Mapping[str, LoraFactors], ...]

    def __repr__(self) -> str:
        return f"FactorTasks({len(self.aligned)} tensors, {len(self.tuned)} models)"

    @property
    def names(self) -> frozenset[str]:
        """Tensors that the adapters change."""
        return frozenset(self.aligned)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each masked part: both factors of every tensor."""
        return {
            f"{name}.{side}": tuple(getattr(one, side).shape)
            for name, one in self.aligned.items()
            for side in (LEFT, RIGHT)
        }

    def fused(self, name: str, gates: Mapping[str, Tensor], coefficient: float, combine: Combine) -> LoraFactors:
        """Return the fused factors of one tensor: `A_s + lambda F(A_i - A_s)`, and the same of B.

        Args:
            name: The tensor.
            gates: Masks by part, not yet rescaled; a part without one is fused as it is.
            coefficient: Strength lambda.
            combine: F.
        """
        start = self.aligned[name]
        sides = []
        for side in (LEFT, RIGHT):
            origin: Tensor = getattr(start, side)
            vectors = [getattr(one[name], side) - origin for one in self.tuned]
            gate = gates.get(f"{name}.{side}")
            whole = combine(vectors, None if gate is None else rescaled(gate)) if coefficient else origin * 0.0
            sides.append(origin + coefficient * whole)
        return LoraFactors(sides[0], sides[1], start.scale)

    def change(self, name: str, gates: Mapping[str, Tensor], coefficient: float, combine: Combine) -> LoraFactors:
        """Return what is added to the aligned model's tensor: the fused product minus the aligned adapter's own."""
        new, old = self.fused(name, gates, coefficient, combine), self.aligned[name]
        return LoraFactors(torch.cat([new.left, -old.left], dim=1), torch.cat([new.right, old.right]), new.scale)

    def update(self, gates: Mapping[str, Tensor], coefficient: float, combine: Combine) -> Update:
        """Return the update of a virtual model over the base below the adapters."""

        def update(name: str, base: Tensor, deltas: tuple[Tensor, ...]) -> Tensor:
            one = self.fused(name, gates, coefficient, combine)
            product = one.scale * (one.left.to(base.device) @ one.right.to(base.device))
            return base + product.to(base.dtype)

        return update


def read_factor_tasks(aligned: TensorSource, tuned: Sequence[TensorSource]) -> FactorTasks:
    """Return the factors of adapters on one base.

    Args:
        aligned: The base itself, or one adapter on it.
        tuned: One adapter on the base each, of the same rank, scale and tensors.

    Raises:
        ConfigError: A model is no such adapter, or adapters do not fit each other.
    """
    parts = [_factors(source) for source in tuned]
    first = parts[0]
    if isinstance(aligned, AdaptedCheckpoint):
        base, start = aligned.base, _factors(aligned)
    else:
        base = aligned
        start = {
            name: LoraFactors(torch.zeros_like(one.left), torch.zeros_like(one.right), one.scale)
            for name, one in first.items()
        }
    for one in (*parts, start):
        wrong = sorted(name for name in {*one, *first} if name not in one or name not in first)
        wrong += [
            name
            for name in sorted({*one, *first} - set(wrong))
            if (one[name].left.shape, one[name].right.shape, one[name].scale)
            != (first[name].left.shape, first[name].right.shape, first[name].scale)
        ]
        if wrong:
            raise _no_factors(f"adapters that differ at '{wrong[0]}'")
    return FactorTasks(base, start, tuple(parts))


def _factors(source: TensorSource) -> dict[str, LoraFactors]:
    if not isinstance(source, AdaptedCheckpoint) or len(source.adapters) != 1:
        raise _no_factors(source.describe())
    adapter = source.adapters[0]
    if adapter.full_tensors or adapter.changes:
        raise _no_factors(f"{source.describe()}, which holds more than plain factors")
    return {name: LoraFactors(one.left.float(), one.right.float(), one.scale) for name, one in adapter.factors.items()}


def _no_factors(found: str) -> ConfigError:
    return ConfigError(
        "SOMF in the space of factors needs plain LoRA adapters that fit each other.",
        expected="one adapter for each tuned model on one base, all of one rank, scale and set of layers",
        found=found,
        fix="use space: weights",
    )
