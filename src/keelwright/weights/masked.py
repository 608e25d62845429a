# SPDX-License-Identifier: Apache-2.0
"""Any edit under a mask: what the edit changes in the aligned model, kept where the mask lets it through."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from keelwright.core.protocols import Chunk, Found, Reach, Stats, TensorEntry, WeightEdit
from keelwright.ops.concrete import MEAN_FLOOR, Export
from keelwright.weights.masks import Mask

_ALIGNED = "aligned"


@dataclass(frozen=True, slots=True)
class Masked:
    """`aligned + m (edit - aligned)` for masked tensors, the edit itself for the others."""

    inner: WeightEdit
    """Reads the role `aligned`."""
    mask: Mask
    export: Export = "mode"
    """How logits become the mask."""
    rescale: bool = True
    """Divide the mask by its mean, as SOMF does; a tensor whose mean is below 0.001 is then the aligned one."""
    seed: int = 0
    """Of the export `sample`."""

    def roles(self) -> tuple[str, ...]:
        """Return the edit's roles."""
        return self.inner.roles()

    def reads(self, name: str) -> tuple[str, ...]:
        """Return what the edit reads, and the aligned model."""
        return tuple(dict.fromkeys((*self.inner.reads(name), _ALIGNED)))

    def reach(self, name: str) -> Reach:
        """Return the edit's reach; POINTWISE where a copy of another model is masked."""
        reach = self.inner.reach(name)
        copied = reach is Reach.COPY and name in self.mask.logits and self.inner.copies(name) != _ALIGNED
        return Reach.POINTWISE if copied else reach

    def copies(self, name: str) -> str:
        """Return what the edit copies."""
        return self.inner.copies(name)

    def passes(self, name: str) -> int:
        """Return the edit's passes."""
        return self.inner.passes(name)

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return the edit's statistics."""
        return self.inner.reduce(name, chunk, found)

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """Return what the edit makes of them."""
        return self.inner.settle(entry, sums, found)

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the masked change on top of the aligned weights."""
        copied = self.inner.reach(name) is Reach.COPY
        edited = chunk.tensors[self.inner.copies(name)] if copied else self.inner.edit(name, chunk, found)
        if name not in self.mask.logits:
            return edited
        aligned = chunk.tensors[_ALIGNED]
        stop = chunk.offset + aligned.numel()
        gate = self.mask.values(name, chunk.offset, stop, export=self.export, seed=self.seed)
        gate = gate.view_as(aligned).to(aligned.dtype)
        if self.rescale:
            mean = self.mask.mean(name, export=self.export, seed=self.seed)
            if mean < MEAN_FLOOR:
                return aligned
            gate = gate / mean
        return aligned + gate * (edited - aligned)

    def survey(self) -> WeightEdit | None:
        """Return the edit's survey."""
        return self.inner.survey()

    def surveyed(self, found: Mapping[str, Found]) -> Self:
        """Return the masked edit that knows what the survey came to."""
        return dataclasses.replace(self, inner=self.inner.surveyed(found))

    def shares(self) -> Hashable:
        """Return the edit's own key: masks take no part in reductions."""
        shared = self.inner.shares()
        return None if shared is None else (type(self.inner), shared)
