# SPDX-License-Identifier: Apache-2.0
"""What a screen is, and how well one works: leakage, recall and false positives with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from keelwright.core.records import Estimate
from keelwright.data.rows import ChatRow
from keelwright.ops.intervals import wilson


class Screen(Protocol):
    """Looks at uploaded rows before they are trained on."""

    @property
    def name(self) -> str:
        """In tables."""

    def flags(self, rows: Sequence[ChatRow]) -> list[bool]:
        """Return for each row whether it is kept out of the training run."""


@dataclass(frozen=True, slots=True)
class ScreenReport:
    """What a screen did to harmful and to benign rows. A rate over no rows is None, not 0."""

    name: str
    leakage: Estimate | None
    """Share of harmful rows that were not flagged, 0..1, Wilson interval."""
    recall: Estimate | None
    """Share of harmful rows that were flagged: 1 - leakage."""
    false_positives: Estimate | None
    """Share of benign rows that were flagged, 0..1, Wilson interval."""


def share(events: Sequence[bool]) -> Estimate | None:
    """Return the share of true events with its Wilson interval; None without events."""
    return wilson(sum(events), len(events)) if events else None


def report_of(name: str, harmful: Sequence[bool], benign: Sequence[bool]) -> ScreenReport:
    """Return the report of a screen from its flags on harmful and on benign rows."""
    return ScreenReport(name, share([not one for one in harmful]), share(harmful), share(benign))


def assess(screen: Screen, harmful: Sequence[ChatRow], benign: Sequence[ChatRow]) -> ScreenReport:
    """Run a screen over harmful and benign rows and return how well it told them apart."""
    return report_of(screen.name, screen.flags(harmful), screen.flags(benign))


def passed(rows: Sequence[ChatRow], flags: Sequence[bool]) -> list[ChatRow]:
    """Return the rows that were not flagged, in order."""
    return [row for row, flagged in zip(rows, flags, strict=True) if not flagged]
