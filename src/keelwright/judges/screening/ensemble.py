# SPDX-License-Identifier: Apache-2.0
"""Several screens as one: a row is kept out when enough of them say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keelwright.core.config import require_in_range
from keelwright.core.errors import ConfigError
from keelwright.data.rows import ChatRow
from keelwright.judges.screening.screen import Screen


@dataclass(frozen=True)
class Ensemble:
    """Members that vote. Rows written against one member must pass the others unseen."""

    members: Sequence[Screen]
    votes: int = 1
    """Members that must flag a row, 1 to their number. 1 lets least pass, at the sum of all false positives."""

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigError(
                "An ensemble of screens needs members.",
                expected="at least one screen",
                found="none",
                fix="give it the guards and filters that rows must pass",
            )
        require_in_range("votes", self.votes, low=1, high=len(self.members))

    @property
    def name(self) -> str:
        """In tables."""
        return f"{self.votes} of {len(self.members)}: {' + '.join(one.name for one in self.members)}"

    def flags(self, rows: Sequence[ChatRow]) -> list[bool]:
        """Return for each row whether at least `votes` members flag it."""
        votes = [one.flags(rows) for one in self.members]
        return [sum(said) >= self.votes for said in zip(*votes, strict=True)]
