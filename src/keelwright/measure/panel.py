# SPDX-License-Identifier: Apache-2.0
"""The judges of an audit, found by name; what would leave this machine is known before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from keelwright.core.protocols import Judge, Progress, Silent
from keelwright.judges.registry import JudgeContext, JudgeLine, find_judge
from keelwright.measure.audit_config import AuditConfig

TASK_JUDGE: Final = JudgeLine(
    "task",
    "Compares with the known answer",
    "the answer",
    "correct or wrong, by the item's scorer",
    "keelwright.measure.scorers:TaskJudge",
)
"""Not in the registry of `judges`: the comparison of tasks lives in this room, above it."""


class _Notes(Silent):
    """Passes notes on, and no counts: whoever asks a panel counts the answers, not the questions that it takes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def note(self, text: str) -> None:
        """Say it."""
        self._progress.note(text)


def panel_of(config: AuditConfig, progress: Progress) -> Callable[[str], Judge]:
    """Return what finds a judge by its name under the settings of an audit; equal names are one judge.

    Args:
        config: The audit's settings.
        progress: Told of a cache that was damaged.
    """
    context = JudgeContext(
        base_url=config.judge_url,
        cache=None if config.cache is None else Path(config.cache),
        offline=config.offline,
        batch_size=config.batch_size,
        progress=_Notes(progress),
    )
    found: dict[str, Judge] = {}

    def find(spec: str) -> Judge:
        if spec not in found:
            found[spec] = find_judge(spec, context, extra=(TASK_JUDGE,))
        return found[spec]

    return find
