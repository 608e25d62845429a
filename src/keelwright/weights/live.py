# SPDX-License-Identifier: Apache-2.0
"""Edits on a live model: tried in place, undone to the bit, evaluated by the same code that writes checkpoints.

A trial is always computed from the sources, never from the trial before it, so nothing drifts; and because the one
place that evaluates edits is shared with the writer, the live model holds the very bits that would be written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from keelwright.core.errors import ModelMismatchError
from keelwright.core.protocols import Reach, TensorEntry, TensorSource, WeightEdit
from keelwright.models.adapters import AdaptedCheckpoint
from keelwright.models.dtypes import STORED_NAMES, TORCH_DTYPES
from keelwright.models.float8 import Float8Checkpoint
from keelwright.models.names import name_map
from keelwright.ops.gram import gram
from keelwright.weights.edit import Edit
from keelwright.weights.numerics import widen, working_dtype
from keelwright.weights.plan import require_same_tensors, untie
from keelwright.weights.sources import AliasedSource, innermost
from keelwright.weights.stream import walk
from keelwright.weights.survey import with_survey
from keelwright.weights.workers import MOST_WORKERS, TASK_BYTES, default_workers, keep_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_THREADS_ABOVE = 1 << 24
"""Elements of a model from which a trial is written by several threads."""

LAYOUT_ROLE = "tuned"
"""The role that the live model plays; edits name it last."""


class LiveSource:
    """The tensors of a module in memory, each tied one once; reads see the values of the moment.

    Args:
        module: The model.
        text: Words for error texts.
    """

    def __init__(self, module: PreTrainedModel, text: str = "the model in memory") -> None:
        self.module = module
        self._text = text
        self._tensors: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, value in module.state_dict(keep_vars=True).items():
            if id(value) not in seen:
                seen.add(id(value))
                self._tensors[name] = value
        self._entries = {
            name: TensorEntry(name, STORED_NAMES[value.dtype], tuple(value.shape))
            for name, value in self._tensors.items()
        }

    def entries(self) -> Mapping[str, TensorEntry]:
        """Return every tensor once."""
        return self._entries

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return a copy of elements `start:stop`, on the CPU."""
        return self._tensors[name].detach().reshape(-1)[start:stop].to("cpu", copy=True)

    def describe(self) -> str:
        """Return words for error texts."""
        return self._text

    def config_json(self) -> dict[str, Any]:
        """Return the module's settings as `config.json` spells them."""
        settings: dict[str, Any] = self.module.config.to_dict()
        return settings

    def frozen(self) -> FrozenSource:
        """Return a copy of the values of this moment, on the CPU."""
        values = {name: self.read(name, 0, entry.elements) for name, entry in self._entries.items()}
        return FrozenSource(values, self)


class FrozenSource:
    """A copy of a live source's values; costs the model's size in memory.

    Args:
        values: Flattened tensors by name.
        live: The source that they were copied from.
    """

    def __init__(self, values: Mapping[str, Tensor], live: LiveSource) -> None:
        self._values = values
        self._live = live

    def entries(self) -> Mapping[str, TensorEntry]:
        """Return the live source's entries."""
        return self._live.entries()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return a copy of elements `start:stop`."""
        return self._values[name][start:stop].clone()

    def describe(self) -> str:
        """Return words for error texts."""
        return self._live.describe()

    def config_json(self) -> dict[str, Any]:
        """Return the module's settings."""
        return self._live.config_json()


@dataclass(frozen=True, slots=True)
class Change:
    """How far an edit took the live model from the tuned weights."""

    relative_norm: float
    """`||edited - tuned|| / ||tuned||` over all weights, accumulated in float64."""
    tensors_changed: int


class LiveTrial:
    """A context manager that tries edits on a live model and leaves it as it was.

    Args:
        module: The tuned model, live. Where adapters are merged into it, in the dtype in which its source stores it.
        sources: Tensors by role. If `tuned` is this very module, its values are copied first.

    Raises:
        ModelMismatchError: The module is not the tuned source's model, or roles do not fit together.
    """

    def __init__(self, module: PreTrainedModel, sources: Mapping[str, TensorSource]) -> None:
        tuned = sources[LAYOUT_ROLE]
        own = tuned.frozen() if isinstance(tuned, LiveSource) and tuned.module is module else tuned
        others = {role: source for role, source in sources.items() if role != LAYOUT_ROLE}
        self.sources, changes, _ = untie({**others, LAYOUT_ROLE: own})
        if changes:
            raise ModelMismatchError(
                "The tuned model ties its output head to the embedding, and another model does not.",
                expected="models that agree, for a trial in memory",
                found=f"changes to the settings: {changes}",
                fix="save the tuned model with tie_word_embeddings false and a head of its own",
            )
        require_same_tensors(self.sources, layout=LAYOUT_ROLE)
        self._pairs = name_map(module, tuned)
        self._parameters = dict(module.named_parameters())
        self._sizes: dict[str, float] = {}
        self._require_stored_dtypes(module)

    def apply(self, edit: WeightEdit) -> Change:
        """Give the live model the edited weights, computed from the sources.

        Raises:
            NumericalError: An input holds NaN or infinity, or a value does not fit the dtype.
        """
        entries = self.sources[LAYOUT_ROLE].entries()
        edit = with_survey(edit, self.sources, entries.values())
        pairs = list(self._pairs.items())
        if sum(entries[tensor].elements for _, tensor in pairs) < _THREADS_ABOVE:
            norms = [self._write(edit, *pair) for pair in pairs]
        else:
            keep_freed_memory()
            # Reading, the compiled loops and copying leave the interpreter free.
            with ThreadPoolExecutor(default_workers(MOST_WORKERS * TASK_BYTES)) as pool:
                norms = list(pool.map(lambda pair: self._write(edit, *pair), pairs))
        moved, size = (math.fsum(one[index] for one in norms) for index in range(2))
        return Change(math.sqrt(moved / size) if size else 0.0, sum(one[0] > 0.0 for one in norms))

    def undo(self) -> None:
        """Give the live model the tuned weights back, bit for bit."""
        self.apply(_Restore())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    @torch.no_grad()
    def _write(self, edit: WeightEdit, parameter: str, tensor: str) -> tuple[float, float]:
        """Write one tensor; return its squared distance from the tuned values, and their squared norm."""
        flat = self._parameters[parameter].view(-1)
        moved, size = 0.0, 0.0
        entry = self.sources[LAYOUT_ROLE].entries()[tensor]
        for part in walk(edit, self.sources, entry, beside=LAYOUT_ROLE):
            flat[part.offset : part.offset + part.values.numel()] = part.values.to(flat.device)
            if part.beside is None:
                raise TypeError("the tuned values were asked for")
            # An adapter's sum comes in float32; the live model held it rounded.
            tuned = _widened(part.beside.to(part.values.dtype))
            moved += float(gram([_widened(part.values)], tuned))
            if tensor not in self._sizes:
                size += float(gram([tuned]))
        # The tuned values are the same at every trial.
        return moved, self._sizes.setdefault(tensor, size)

    def _require_stored_dtypes(self, module: PreTrainedModel) -> None:
        # Any other dtype was cast from the stored values when the model was loaded, and a trial casts in the same way.
        # An adapter's sum, and a number times its scale, were rounded to the model's dtype and never to the stored
        # one: that could not be undone.
        tuned = self.sources[LAYOUT_ROLE]
        inner = tuned.inner if isinstance(tuned, AliasedSource) else tuned
        touched = set(inner.touched()) if isinstance(inner, AdaptedCheckpoint) else set()
        base = innermost(tuned)
        touched |= set(base.scalings) if isinstance(base, Float8Checkpoint) else set()
        for parameter, tensor in self._pairs.items():
            found, wanted = self._parameters[parameter].dtype, TORCH_DTYPES[tuned.entries()[tensor].dtype]
            if tensor in touched and found is not wanted:
                raise ModelMismatchError(
                    f"The live {type(module).__name__} is not in the dtype of its checkpoint.",
                    expected=f"{parameter} in {str(wanted).removeprefix('torch.')}",
                    found=str(found).removeprefix("torch."),
                    fix="load it without a dtype of your own: a trial must hold the bits that would be written",
                )


def _widened(values: Tensor) -> Tensor:
    dtype = working_dtype(values.dtype)
    return widen(values, dtype, torch.empty(values.numel(), dtype=dtype))[0]


@dataclass(frozen=True, slots=True)
class _Restore(Edit):
    """The edit that changes nothing."""

    def reach(self, name: str) -> Reach:
        return Reach.COPY
