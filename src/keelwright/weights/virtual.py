# SPDX-License-Identifier: Apache-2.0
"""A model whose weights are functions of trainable numbers: nothing is written, and gradients reach the numbers.

The base and the task vectors come from sources and are held in float32 (float64 for float64 modules), for the selected
tensors only. Every forward pass makes the weights anew and runs the module with them through
`torch.func.functional_call`; the module's own weights neither change nor receive gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import TensorSource
from keelwright.models.names import name_map
from keelwright.weights.numerics import require_finite, working_dtype

Update = Callable[[str, Tensor, tuple[Tensor, ...]], Tensor]
"""From a tensor's name, its base and its task vectors to its weights, differentiable in whatever is trained."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """One tensor of the base with the task vector of each model."""

    base: Tensor
    deltas: tuple[Tensor, ...]


class VirtualModel:
    """A module run with weights made from a base and task vectors.

    Args:
        module: Any live model of the architecture; gives structure, dtypes and device.
        base: The model that the task vectors start from.
        models: The models that they lead to.
        select: Names of the tensors to hold; None takes those that any model changed.

    Raises:
        ConfigError: A selected tensor does not exist.
        ModelMismatchError: The module and a source do not have the same tensors.
        NumericalError: A weight is not finite.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        base: TensorSource,
        models: Sequence[TensorSource],
        *,
        select: Collection[str] | None = None,
    ) -> None:
        self.module = module
        self._parameters = dict(module.named_parameters())
        pairs = name_map(module, base)
        unknown = sorted(set(select or ()) - set(pairs.values()))
        if unknown:
            raise ConfigError(
                f"There is no tensor '{unknown[0]}' to select.",
                expected=f"names such as '{next(iter(pairs.values()), 'none')}'",
                found=", ".join(unknown[:3]),
                fix="take the names from `keelwright weights info`",
            )
        self.names: dict[str, str] = {}
        """Parameter to tensor, for the tensors held."""
        self.vectors: dict[str, Vectors] = {}
        """By tensor name."""
        self._fixed: dict[str, Tensor] = {}
        for parameter, name in pairs.items():
            own = self._parameters[parameter]
            start = self._read(base, name, own)
            if own.is_floating_point() and (select is None or name in select):
                deltas = tuple(self._read(model, name, own) - start for model in models)
                if select is not None or any(bool(delta.any()) for delta in deltas):
                    self.names[parameter] = name
                    self.vectors[name] = Vectors(start, deltas)
                    continue
            # What no model changed is the base's, whatever the module holds; held only where the two differ.
            if not torch.equal(start.to(own.dtype), own.detach()):
                self._fixed[parameter] = start.to(own.dtype)

    def weights(self, update: Update) -> dict[str, Tensor]:
        """Return every parameter's value; those held are made by `update`, in the module's dtype."""
        made = {parameter: own.detach() for parameter, own in self._parameters.items()}
        made.update(self._fixed)
        for parameter, name in self.names.items():
            one = self.vectors[name]
            made[parameter] = update(name, one.base, one.deltas).to(self._parameters[parameter].dtype)
        return made

    def logits(self, weights: Mapping[str, Tensor], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits of a batch under the given weights.

        Args:
            weights: What `weights` returned.
            input_ids: Token ids. Shape `[batch, tokens]`.
            attention_mask: 1 for tokens, 0 for padding. Shape `[batch, tokens]`.

        Returns:
            Shape `[batch, tokens, vocab]`.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        output = torch.func.functional_call(self.module, dict(weights), (), inputs, tie_weights=True)
        found: Tensor = output.logits
        return found

    @contextmanager
    def installed(self, weights: Mapping[str, Tensor]) -> Iterator[PreTrainedModel]:
        """Yield the module with the given weights in place, for generation; its own come back to the bit."""
        changed = [name for name in weights if name in self.names or name in self._fixed]
        kept = {name: self._parameters[name].detach().clone() for name in changed}
        try:
            with torch.no_grad():
                for name in changed:
                    self._parameters[name].copy_(weights[name])
            yield self.module
        finally:
            with torch.no_grad():
                for name, values in kept.items():
                    self._parameters[name].copy_(values)

    @staticmethod
    def _read(source: TensorSource, name: str, like: Tensor) -> Tensor:
        entry = source.entries()[name]
        values = source.read(name, 0, entry.elements)
        if values.is_floating_point():
            require_finite(values, role=source.describe(), name=name, offset=0, source=source.describe())
            values = values.to(working_dtype(like.dtype))
        return values.view(entry.shape).to(like.device)


def scaled(coefficients: Mapping[str, Tensor] | Tensor) -> Update:
    """Return the update `base + sum_i c_i delta_i` with coefficients that may be trained.

    Args:
        coefficients: One for each model, shape `[models]`; or such a tensor by tensor name, for example one shared by
            the tensors of a layer. A tensor without an entry keeps the base.
    """

    def update(name: str, base: Tensor, deltas: tuple[Tensor, ...]) -> Tensor:
        own = coefficients if isinstance(coefficients, Tensor) else coefficients.get(name)
        if own is None:
            return base
        total = base
        for index, delta in enumerate(deltas):
            total = total + own[index].to(base.device, base.dtype) * delta
        return total

    return update
