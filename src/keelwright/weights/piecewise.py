# SPDX-License-Identifier: Apache-2.0
"""One edit made of several: each tensor has its own method or settings, and its own models in the method's roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from keelwright.core.digests import json_digest
from keelwright.core.protocols import Chunk, Found, Reach, Stats, TensorEntry, WeightEdit
from keelwright.weights.edit import Edit

LAYOUT = "layout"
"""The role of a `Blueprint`, which is never read."""


@dataclass(frozen=True, slots=True)
class Part:
    """An edit and which of the whole's roles stands for each of its own."""

    edit: WeightEdit
    roles: tuple[tuple[str, str], ...]
    """Pairs of the edit's role and the whole's."""

    @property
    def outer(self) -> Mapping[str, str]:
        """The whole's role for each of the edit's."""
        return dict(self.roles)


class Blueprint:
    """A `TensorSource` of names, dtypes and shapes alone: the output that several models make together.

    Args:
        entries: The output's tensors.
        text: Words for error texts.
    """

    def __init__(self, entries: Mapping[str, TensorEntry], text: str) -> None:
        self._entries = dict(entries)
        self._text = text

    def entries(self) -> Mapping[str, TensorEntry]:
        """Return the output's tensors."""
        return self._entries

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Raise: there are no values."""
        raise TypeError(f"'{name}' of {self._text} has no values")

    def describe(self) -> str:
        """Return words for error texts."""
        return self._text

    def data_digest(self) -> str:
        """Return a digest of names, dtypes and shapes."""
        return json_digest([[one.name, one.dtype, list(one.shape)] for one in self._entries.values()])


@dataclass(frozen=True, slots=True)
class Piecewise(Edit):
    """Different edits for different tensors.

    Args:
        parts: The edits.
        places: For each output tensor the index of its part.
        models: The whole's roles, without the layout.
    """

    parts: tuple[Part, ...]
    places: Mapping[str, int]
    models: tuple[str, ...]

    def roles(self) -> tuple[str, ...]:
        """Return every model's role, and last that of the layout."""
        return (*self.models, LAYOUT)

    def reads(self, name: str) -> tuple[str, ...]:
        """Return the roles that the tensor's own edit reads."""
        part = self._part(name)
        return tuple(dict.fromkeys(part.outer[role] for role in part.edit.reads(name)))

    def reach(self, name: str) -> Reach:
        """Return the reach of the tensor's own edit."""
        return self._part(name).edit.reach(name)

    def copies(self, name: str) -> str:
        """Return whose bytes the tensor's own edit copies."""
        part = self._part(name)
        return part.outer[part.edit.copies(name)]

    def passes(self, name: str) -> int:
        """Return the passes of the tensor's own edit."""
        return self._part(name).edit.passes(name)

    def span(self, entry: TensorEntry, found: Found) -> tuple[int, int]:
        """Return what the next pass of the tensor's own edit must see."""
        return self._part(entry.name).edit.span(entry, found)

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return the statistics of the tensor's own edit."""
        part = self._part(name)
        return part.edit.reduce(name, _inner(part, chunk), found)

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """Return what the sums come to for the tensor's own edit."""
        return self._part(entry.name).edit.settle(entry, sums, found)

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return what the tensor's own edit makes of the chunk."""
        part = self._part(name)
        return part.edit.edit(name, _inner(part, chunk), found)

    def survey(self) -> WeightEdit | None:
        """Return the surveys of those parts that have one; each looks at its own tensors."""
        asked = {index: survey for index, part in enumerate(self.parts) if (survey := part.edit.survey()) is not None}
        if not asked:
            return None
        parts = tuple(replace(part, edit=asked.get(index, _Silent())) for index, part in enumerate(self.parts))
        return replace(self, parts=parts)

    def surveyed(self, found: Mapping[str, Found]) -> Self:
        """Return the edit whose parts know what their surveys came to."""
        parts = []
        for number, part in enumerate(self.parts):
            own = {name: one for name, one in found.items() if self.places[name] == number}
            known = part.edit.survey() is not None
            parts.append(replace(part, edit=part.edit.surveyed(own)) if known else part)
        return replace(self, parts=tuple(parts))

    def edit_of(self, name: str) -> WeightEdit:
        """Return the tensor's own edit."""
        return self._part(name).edit

    def _part(self, name: str) -> Part:
        return self.parts[self.places[name]]


@dataclass(frozen=True, slots=True)
class _Silent(Edit):
    """Stands for a part that surveys nothing."""

    def reads(self, name: str) -> tuple[str, ...]:
        return ()


def _inner(part: Part, chunk: Chunk) -> Chunk:
    return replace(chunk, tensors={own: chunk.tensors[outer] for own, outer in part.roles if outer in chunk.tensors})
