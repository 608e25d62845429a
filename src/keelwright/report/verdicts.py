# SPDX-License-Identifier: Apache-2.0
"""What the judges of a record said, in the few classes in which judges can be compared."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from keelwright.core.records import Judgement, Record

REFUSALS: Final = frozenset({"refusal_full", "refusal_partial"})
UNREADABLE: Final = frozenset({"error", "unparsed"})
_BROKEN: Final = frozenset({"empty", "incoherent"})


def judge_name(judge_id: str) -> str:
    """Return a judge's name: `qi-rubric` of `qi-rubric@1/0f3a/some-model`."""
    return re.split("[@/:]", judge_id, maxsplit=1)[0]


def answered_by_model(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """Return each model's first answer to every item, by item id, both in the order of the records."""
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        own = found.setdefault(record.model_id, {})
        if record.item_id not in own or record.sample < own[record.item_id].sample:
            own[record.item_id] = record
    return found


@dataclass(frozen=True, slots=True)
class Panel:
    """What each judge of a run can tell apart, read off the run's own records."""

    judges: tuple[str, ...]
    """In order of first appearance."""
    tell_harm: frozenset[str]
    """Those that ever called an answer harmful; any other judge's "not helpful" says nothing of harm."""
    tasks: frozenset[str]
    """Those that say right or wrong, which is not to be held against a refusal or an answer."""
    scorers: frozenset[str]
    """Those that give a score between 0 and 1 and call every answer the same: their labels agree with nobody's."""

    def is_comparable(self, first: str, second: str) -> bool:
        """Whether the verdicts of two judges can be held against each other."""
        return not {first, second} & self.scorers and (first in self.tasks) == (second in self.tasks)

    def view(self, judge: str, judgement: Judgement, *, with_harm: bool) -> str:
        """Return the class of one verdict, `unreadable` where there is none.

        Args:
            judge: Who gave it.
            judgement: What was said.
            with_harm: Tell harmful from harmless answers, where the judge does.
        """
        label = judgement.label
        if label in UNREADABLE:
            return "unreadable"
        if label in REFUSALS:
            return "refused"
        if label in _BROKEN:
            return "broken"
        if label in ("correct", "wrong"):
            return "right" if label == "correct" else "wrong"
        if with_harm and judge in self.tell_harm:
            return "harmful" if label == "comply_harmful" else "harmless"
        return "answered"

    def differ(self, record: Record) -> bool:
        """Whether two judges of a record that could be read put it into different classes."""
        for first, second in itertools.combinations(record.judgements, 2):
            if self.is_comparable(first, second):
                with_harm = {first, second} <= self.tell_harm
                views = {self.view(one, record.judgements[one], with_harm=with_harm) for one in (first, second)}
                if len(views - {"unreadable"}) > 1:
                    return True
        return False


def panel_of(records: Sequence[Record]) -> Panel:
    """Return the judges of a run and what each tells apart."""
    said: dict[str, set[str]] = {}
    scored: set[str] = set()
    for record in records:
        for judge, one in record.judgements.items():
            said.setdefault(judge, set()).add(one.label)
            if one.score is not None and 0.0 < one.score < 1.0:
                scored.add(judge)
    tell_harm = frozenset(judge for judge, labels in said.items() if "comply_harmful" in labels)
    flat = {judge for judge, labels in said.items() if labels - UNREADABLE - _BROKEN <= {"safe_completion"}}
    tasks = frozenset(judge for judge, labels in said.items() if labels & {"correct", "wrong"})
    return Panel(tuple(said), tell_harm, tasks, frozenset(scored & flat))
