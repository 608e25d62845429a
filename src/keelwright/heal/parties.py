# SPDX-License-Identifier: Apache-2.0
"""The models of a run in their roles: opened lazily, loaded when measured, let go when no longer needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from keelwright.core.protocols import TensorSource
from keelwright.models.headers import tensor_bytes
from keelwright.models.loading import LoadedModel, load
from keelwright.models.refs import LocalModel, ModelRef, parse_ref, resolve
from keelwright.models.sources import open_source
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

    def load(self, *, device: str, offline: bool) -> LoadedModel:
        """Load the model for generation; a live one is returned as it is."""
        return load(self.ref, device=device, offline=offline)


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
