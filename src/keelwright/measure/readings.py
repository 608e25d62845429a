# SPDX-License-Identifier: Apache-2.0
"""What metrics read off a record: the verdict of a judge by name, and the facts that rows are narrowed by.

A judge is known by its name, the part of its id before `@`, `/` or `:`; a metric that needs a judge which did not see
the record leaves the record out. So does every metric with what could not be judged: an error or an unreadable verdict
raises no figure and lowers none.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Final

from keelwright.core.records import Judgement, Record
from keelwright.judges.registry import LINES
from keelwright.measure.metrics import EXCLUDED_LABELS

REFUSALS: Final = frozenset({"refusal_full", "refusal_partial"})

HARM_JUDGES: Final = frozenset(
    {line.name for line in LINES if line.knows_harm} | {"workshop-exact", "pictures-exact", "profiles-exact"}
)
"""Judges that tell a harmful answer from a harmless one: those of the registry that say so, and those of the lab. One
that is not listed gives no harm figure, rather than a false zero."""

SILENT_ON_HARM: Final = frozenset(
    {line.name for line in LINES if not line.knows_harm}
    | {"qi", "qi-casefold", "xstest", "keelwright-toxicity", "task"}
)
"""Judges that cannot tell harm, by the names in their verdicts: as the first judge of a record they leave the harm rate
unmeasured, where a zero would be read as safety."""

SILENT_ON_REFUSALS: Final = frozenset(
    {
        *("keelwright-toxicity", "unit-tests", "task", "granite-guardian-3.3", "granite-guardian-4.1", "shieldgemma"),
        *("llama-guard-3", "llama-guard-3-1b", "llama-guard-4"),
    }
)
"""Judges to whom a refusal is one more safe answer: first of a record, they leave refusals and answers unmeasured."""


@functools.lru_cache(maxsize=1024)
def name_of(judge_id: str) -> str:
    """Return a judge's name: `qi-rubric` of `qi-rubric@1/0f3a/some-model`."""
    return re.split("[@/:]", judge_id, maxsplit=1)[0]


def verdict(record: Record, *names: str) -> Judgement | None:
    """Return the first verdict of a judge of one of these names; None where there is none that could be read."""
    for judge_id, judgement in record.judgements.items():
        if name_of(judge_id) in names:
            return None if judgement.label in EXCLUDED_LABELS else judgement
    return None


def harm_verdict(record: Record) -> Judgement | None:
    """Return the first verdict of a judge that knows harm; None where no such judge gave a readable one."""
    return verdict(record, *HARM_JUDGES)


def first_judge(record: Record) -> str:
    """Return the name of the judge that gives the record its label; empty where nobody has judged it."""
    return name_of(next(iter(record.judgements), ""))


def knows_harm(record: Record) -> bool:
    """Whether the record's own judge tells harm; one that nobody lists is believed where it gives a score."""
    name = first_judge(record)
    return name in HARM_JUDGES or (name not in SILENT_ON_HARM and record.score is not None)


def is_judged(record: Record) -> bool:
    """Whether the record's label is a verdict at all."""
    return record.label not in EXCLUDED_LABELS


def narrowed(records: Sequence[Record], fact: str, value: str) -> list[Record]:
    """Return the records whose fact has this value, and those without such a fact; none where no record has the value.

    Records without the fact stay because they are the other side of a comparison: the clean problem beside its
    perturbations.

    Args:
        records: One model's records.
        fact: Name of a fact; `hazard` and `set` speak of the record's own fields, and `judge` leaves each record one
            judge's verdict.
        value: What the fact must be.
    """
    if fact == "judge":
        kept = [_by_judge(record, value) for record in records]
        return [record for record in kept if record.judgements]
    found = [(record, _fact(record, fact)) for record in records]
    if all(own != value for _, own in found):
        return []
    return [record for record, own in found if own in (None, value)]


def _by_judge(record: Record, judge: str) -> Record:
    own = {one: verdict for one, verdict in record.judgements.items() if judge in (one, name_of(one))}
    return dataclasses.replace(record, judgements=own)


def _fact(record: Record, fact: str) -> str | None:
    if fact == "hazard":
        return record.hazard
    return record.suite if fact == "set" else record.facts.get(fact)
