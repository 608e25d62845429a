# SPDX-License-Identifier: Apache-2.0
"""What a log of another program says, as records: the noun that its readers return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from keelwright.core.config import require_choice
from keelwright.core.errors import DataError
from keelwright.core.records import Record


@dataclass(frozen=True, slots=True)
class ForeignLog:
    """One model's answers to one task, as another program logged them."""

    source: str
    """The user's own words for the file."""
    program: str
    """`inspect` or `lm-eval`, with its version where the log names it."""
    task: str
    model: str
    created: str
    """ISO time, as the log gives it; empty where it does not."""
    status: str
    """`success` where the log is whole; else the program's own word."""
    primary: str
    """The scorer whose judgement comes first."""
    scorers: tuple[str, ...]
    """Everything that gave scores, the primary first."""
    higher_is_better: Mapping[str, bool]
    """By scorer, where the log says; what it does not name is better when higher."""
    records: tuple[Record, ...]
    questions: Mapping[str, str] = field(default_factory=dict)
    """Digest of what each item asks and expects, by item."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """How the items were asked and scored, in words: what two logs must agree in, as far as both say it."""
    is_ours: bool = False
    """Whether every sample is a record that keelwright exported: its labels then mean what they do in a run."""
    notes: tuple[str, ...] = ()
    """What the reader should know: errors, samples without a score, values that were left out."""


def choose_primary(wanted: str | None, scorers: Sequence[str], source: str) -> str:
    """Return the scorer that comes first: the one asked for, or the first that the log has.

    Raises:
        ConfigError: The log has no such scorer; the nearest name is offered.
    """
    if wanted is None:
        return scorers[0] if scorers else "none"
    require_choice(f"scorer of {source}", wanted, scorers)
    return wanted


def require_distinct(records: Sequence[Record], source: str) -> None:
    """Raise `DataError` where an item's answer is there twice."""
    seen: dict[tuple[str, int], int] = {}
    for position, record in enumerate(records, 1):
        key = (record.item_id, record.sample)
        if key in seen:
            raise DataError(
                f"'{source}' has the sample '{record.item_id}', epoch {record.sample + 1}, twice.",
                expected="every sample once per epoch",
                found=f"samples number {seen[key]} and {position}",
                fix="merge logs by reading each on its own",
            )
        seen[key] = position
