# SPDX-License-Identifier: Apache-2.0
"""What a server was asked for, and what it cost."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Usage:
    """Totals of an engine over all its calls."""

    requests: int
    """Attempts, those that failed included."""
    prompt_tokens: int
    """As the server counts them."""
    completion_tokens: int
    """As the server counts them."""
    uncounted: int
    """Answers for which the server gave no count of tokens."""
    retries: Mapping[str, int]
    """Attempts that were repeated, by reason."""
    failures: Mapping[str, int]
    """Answers that could not be had, by reason; `blocked` are those that a filter of the server withheld."""
    served_by: tuple[str, ...]
    """Models, with the fingerprint of their settings where one is given, as the replies name them."""
    cost: float | None
    """In the currency of the prices; None without prices. What failed attempts cost is not known."""

    def to_mapping(self) -> dict[str, Any]:
        """Return the totals as plain values, for `summary.json`."""
        return {**dataclasses.asdict(self), "served_by": list(self.served_by)}


@dataclass(slots=True)
class Tally:
    """Totals while they grow."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    served_by: set[str] = field(default_factory=set)

    def usage(self, price_in: float | None, price_out: float | None) -> Usage:
        """Return the totals as of now.

        Args:
            price_in: Per million tokens read.
            price_out: Per million tokens written.
        """
        priced = price_in is not None or price_out is not None
        cost = (self.prompt_tokens * (price_in or 0.0) + self.completion_tokens * (price_out or 0.0)) / 1e6
        return Usage(
            requests=self.requests,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            uncounted=self.uncounted,
            retries=dict(self.retries),
            failures=dict(self.failures),
            served_by=tuple(sorted(self.served_by)),
            cost=cost if priced else None,
        )
