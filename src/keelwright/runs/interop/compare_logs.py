# SPDX-License-Identifier: Apache-2.0
"""Logs of other programs compared in pairs: per scorer the change of its mean on the same items.

Each item is its own control, its epochs are averaged first, and items of one cluster move together. A scorer that says
yes or no on every item is tested by exact McNemar, any other by swapping the two sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from keelwright.core.config import require_choice
from keelwright.core.errors import DataError
from keelwright.core.records import Estimate, Record
from keelwright.measure.change import Change, change_of
from keelwright.measure.compare import compare_records
from keelwright.measure.metric import Metric, Unit, item_rows, share
from keelwright.ops.paired import holm
from keelwright.runs.interop.foreign import ForeignLog
from keelwright.runs.interop.inspect_log import read_inspect_log
from keelwright.runs.interop.lm_eval_samples import read_lm_eval_samples

FORMATS: Final = (".eval", ".json", ".jsonl")
"""Endings of files that `open_log` reads."""
QUESTIONS: Final = "questions"
"""Name of the condition that both logs ask the same; the others are named by the logs' settings."""

_SHORT: Final = 200


def is_log(path: Path) -> bool:
    """Whether a path looks like a log of another program rather than a run folder."""
    return path.is_file() and path.suffix.lower() in FORMATS


def open_log(path: Path, *, scorer: str | None = None) -> ForeignLog:
    """Read a log by its ending: `.eval` and `.json` are Inspect's, `.jsonl` is lm-evaluation-harness's.

    Args:
        path: The file.
        scorer: Whose judgement comes first.

    Raises:
        DataError: It has another ending, or is no whole log.
        MissingError, UnsafeInputError, ConfigError: As the reader of the format.
    """
    ending = path.suffix.lower()
    if ending == ".jsonl":
        return read_lm_eval_samples(path, scorer=scorer)
    if ending in FORMATS:
        return read_inspect_log(path, scorer=scorer)
    raise DataError(
        f"'{path}' is not a log that can be read.",
        expected=f"a file that ends in {', '.join(FORMATS)}",
        found=path.suffix or "a name without an ending",
        fix="give a log of Inspect, or the samples of lm-evaluation-harness",
    )


def score_metrics(*logs: ForeignLog) -> list[Metric]:
    """Return one metric per scorer that all logs have: the mean of its scores over items."""
    shared = [name for name in logs[0].scorers if all(name in log.scorers for log in logs)]
    return [_mean_of(name, logs) for name in shared]


def estimates_of(log: ForeignLog) -> dict[str, Estimate]:
    """Return each scorer's mean with its 95 % interval and count of items; scorers without a number are left out."""
    found = {metric.name: metric.estimate(log.records) for metric in score_metrics(log)}
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def compare_logs(
    before: ForeignLog, after: ForeignLog, *, scorers: Sequence[str] | None = None, allow: Collection[str] = ()
) -> list[Change]:
    """Return the paired change of every scorer that both logs have, Holm-adjusted as one family.

    Of two logs that keelwright exported, and without named scorers, the changes are those of the two runs.

    Args:
        before, after: Two logs of the same task.
        scorers: The family; None takes every scorer that both have.
        allow: What may differ: `questions`, or names of the logs' settings (`solver`, `generation`, `epochs`, ...).

    Raises:
        ConfigError: A name to allow is no condition of these logs, or a scorer is unknown.
        DataError: The two were made under different conditions, or share no scored item.
    """
    if before.is_ours and after.is_ours and scorers is None:
        return compare_records(before.records, after.records, allow=allow)
    require_same_task(before, after, allow=allow)
    metrics = score_metrics(before, after)
    for name in scorers or ():
        require_choice("scorer", name, [metric.name for metric in metrics])
    family = [metric for metric in metrics if scorers is None or metric.name in scorers]
    found = [change_of(metric, before.records, after.records) for metric in family]
    changes = [change for change in found if change is not None]
    if not changes:
        raise DataError(
            "The two logs share no scored item.",
            expected="numbers of the same scorers for the same items",
            found=f"{_told(before)}; {_told(after)}",
            fix="run the same task with both models",
        )
    adjusted = holm([change.p_value for change in changes])
    return [dataclasses.replace(change, p_holm=p) for change, p in zip(changes, adjusted, strict=True)]


def require_same_task(before: ForeignLog, after: ForeignLog, *, allow: Collection[str] = ()) -> None:
    """Raise `DataError` unless both logs asked the same in the same way; the error names what differs.

    Items count that both have, and settings that both logs tell.

    Args:
        before, after: Two logs.
        allow: What may differ: `questions`, or names of the logs' settings.
    """
    for name in allow:
        require_choice("allow", name, [QUESTIONS, *dict.fromkeys([*before.settings, *after.settings])])
    for item, question in before.questions.items():
        if QUESTIONS not in allow and after.questions.get(item, question) != question:
            raise DataError(
                f"The two logs ask different questions under the name '{item}'.",
                expected=f"the same input and target as in '{before.source}'",
                found=f"others in '{after.source}'",
                fix="run the same version of the task, with choices in the same order, for both",
            )
    for name, value in before.settings.items():
        other = after.settings.get(name, value)
        if name not in allow and other != value:
            raise DataError(
                f"The two logs differ in '{name}', so their numbers cannot be compared.",
                expected=f"{_cut(value)} on both sides, as in '{before.source}'",
                found=f"{_cut(other)} in '{after.source}'",
                fix=f"run the task with the same settings for both, or allow '{name}' to differ",
            )


def _cut(text: str) -> str:
    return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."


def _mean_of(name: str, logs: Sequence[ForeignLog]) -> Metric:
    values = [score for log in logs for record in log.records if (score := _score(record, name)) is not None]
    unit: Unit = "rate" if all(0.0 <= value <= 1.0 for value in values) else "score"
    better = all(log.higher_is_better.get(name, True) for log in logs)

    def contribution(record: Record) -> tuple[float, ...] | None:
        score = _score(record, name)
        return None if score is None else (score, 1.0)

    return Metric(
        name=name,
        title=name,
        counts=f"mean of '{name}' over items",
        higher_is_better=better,
        rows=lambda records: item_rows(records, contribution),
        value=share,
        unit=unit,
        is_binary=unit == "rate",
    )


def _score(record: Record, name: str) -> float | None:
    opinion = record.judgements.get(name)
    return None if opinion is None else opinion.score


def _told(log: ForeignLog) -> str:
    return f"{len(log.records)} answers in '{log.source}' with {', '.join(log.scorers) or 'no scorer'}"
