# SPDX-License-Identifier: Apache-2.0
"""The defaults of a weight edit: what most methods need not say."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Self

from torch import Tensor

from keelwright.core.protocols import Chunk, Found, Reach, Stats, TensorEntry, WeightEdit

TUNED = "tuned"


def tuned_roles(models: int) -> tuple[str, ...]:
    """Return the roles of so many tuned models, the first one last: it lays out the output.

    >>> tuned_roles(3)
    ('tuned_2', 'tuned_3', 'tuned')
    """
    return (*(f"{TUNED}_{number}" for number in range(2, models + 1)), TUNED)


def model_roles(models: int) -> tuple[str, ...]:
    """Return the roles of so many tuned models in the order in which they were given.

    >>> model_roles(3)
    ('tuned', 'tuned_2', 'tuned_3')
    """
    return (TUNED, *(f"{TUNED}_{number}" for number in range(2, models + 1)))


class Edit:
    """A pointwise edit that copies from the layout's role, reduces nothing and surveys nothing."""

    __slots__ = ()

    def roles(self) -> tuple[str, ...]:
        """Return the models it needs; the last one lays out the output."""
        return (TUNED,)

    def reads(self, name: str) -> tuple[str, ...]:
        """Return all roles."""
        return self.roles()

    def reach(self, name: str) -> Reach:
        """Return POINTWISE."""
        return Reach.POINTWISE

    def copies(self, name: str) -> str:
        """Return the role that lays out the output."""
        return self.roles()[-1]

    def passes(self, name: str) -> int:
        """Return one pass where the reach is REDUCED, else none."""
        return int(self.reach(name) is Reach.REDUCED)

    def span(self, entry: TensorEntry, found: Found) -> tuple[int, int]:
        """Return the whole tensor."""
        return 0, entry.elements

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return no statistics."""
        return {}

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """Return the sums as they are."""
        return sums

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the layout's values."""
        return chunk.tensors[self.roles()[-1]]

    def survey(self) -> WeightEdit | None:
        """Return None: no tensor depends on another."""
        return None

    def surveyed(self, found: Mapping[str, Found]) -> Self:
        """Return the edit itself."""
        return self

    def shares(self) -> Hashable:
        """Return None: reductions are shared with no other edit."""
        return None
