# SPDX-License-Identifier: Apache-2.0
"""The models of a run in their roles: opened lazily, loaded when measured, let go when no longer needed."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from keelwright.core.errors import NumericalError
from keelwright.core.protocols import Progress, TensorSource
from keelwright.models.headers import tensor_bytes
from keelwright.models.loading import LoadedModel, load, load_tokenizer
from keelwright.models.refs import LocalModel, ModelRef, parse_ref, resolve
from keelwright.models.sources import first_nonfinite, open_source
from keelwright.weights.live import LiveSource
from keelwright.weights.sources import source_digest

ModelLike = str | Path | ModelRef | LoadedModel


@dataclass(frozen=True, slots=True)
class Party:
    """One model of a run in its role."""

    role: str
    ref: ModelRef
    local: LocalModel | None
    """Its files; None for a model in memory."""
    source: TensorSource

    @property
    def digest(self) -> str:
        """Content digest of the weights, adapters included."""
        return source_digest(self.source)

    @property
    def has_adapter(self) -> bool:
        """Whether the model is a checkpoint with adapters."""
        return self.local is not None and bool(self.local.adapter_folders)

    @property
    def total_bytes(self) -> int:
        """Size of the weights as stored, from headers alone."""
        return sum(tensor_bytes(entry) for entry in self.source.entries().values())

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(entry.elements for entry in self.source.entries().values())

    def require_finite(self) -> None:
        """Read all weights once and raise `NumericalError` where one is NaN or infinite.

        Such a model answers, and its answers would pass for a measurement.
        """
        found = first_nonfinite(self.source)
        if found is None:
            return
        name, index = found
        raise NumericalError(
            f"The tensor '{name}' of '{self.role}' holds NaN or infinity.",
            expected=f"finite weights in {self.ref.text}",
            found=f"{float(self.source.read(name, index, index + 1)[0])} at element {index}",
            fix="copy the model again from where it came from; where training made it, take an earlier checkpoint",
        )

    def load(self, *, device: str, offline: bool) -> LoadedModel:
        """Load the model for generation; a live one is returned as it is."""
        return load(self.ref, device=device, offline=offline)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return its tokenizer, without loading weights."""
        return load_tokenizer(self.local) if self.local is not None else self.load(device="cpu", offline=True).tokenizer

    def load_copy(self, *, device: str, offline: bool) -> LoadedModel:
        """Load the model so that its weights may be changed: a live one is copied."""
        model = self.load(device=device, offline=offline)
        return model if self.local is not None else replace(model, module=copy.deepcopy(model.module))


def check_weights(parties: Iterable[Party], progress: Progress) -> None:
    """Read every weight of every model once; `NumericalError` names the first that is NaN or infinite."""
    for party in parties:
        progress.stage(f"checking the weights of {party.role}")
        party.require_finite()


def open_party(role: str, model: ModelLike, *, offline: bool) -> Party:
    """Open a model by its headers; no weights are read.

    Args:
        role: `aligned`, `tuned` or `unaligned`.
        model: Any form of a model reference.
        offline: Never ask the hub.

    Raises:
        KeelwrightError: Whatever is wrong with the reference or its files.
    """
    ref = parse_ref(model)
    if ref.live is not None:
        return Party(role, ref, None, LiveSource(ref.live.module))
    local = resolve(ref, offline=offline)
    return Party(role, ref, local, open_source(local))
