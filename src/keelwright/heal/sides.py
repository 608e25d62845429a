# SPDX-License-Identifier: Apache-2.0
"""The sides of a comparison: a run of ours, or a log of another program; without a model, from files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from keelwright.core.digests import file_digest
from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Record
from keelwright.measure.metrics import METRICS
from keelwright.runs.folder import ReadRun, read_run, unfinished
from keelwright.runs.interop.compare_logs import is_log, open_log
from keelwright.runs.interop.foreign import ForeignLog

_FOREIGN_CONDITIONS = ("template", "decoding", "token limit")
"""What logs of other programs do not hold."""


@dataclass(frozen=True, slots=True)
class Side:
    """One model's records with what is known of them."""

    name: str
    """The folder or file, in the user's own words."""
    digest: str
    """Of the file that holds the records."""
    records: tuple[Record, ...]
    primary: str
    """The metric that decides."""
    metrics: tuple[str, ...] = METRICS
    """Compared together, the primary one first."""
    utility: Mapping[str, Any] | None = None
    allowed: tuple[str, ...] = ()
    """Conditions that cannot be checked, as the file does not hold them."""
    log: ForeignLog | None = None
    """What else a log of another program says."""


def sides_of(after: Path, before: Path | None) -> tuple[Side, Side | None]:
    """Return the side in question and the one it is held against.

    Args:
        after: A run of `audit` (with `--against` it holds both sides), `compare` or `heal`, or a log.
        before: A second run or log; None takes what `after` holds.

    Raises:
        DataError: A run is unfinished, or has no records.
        ConfigError: `after` is a comparison and a second run is named as well.
    """
    if is_log(after):
        return read_side(after), None if before is None else read_side(before)
    found = _finished(after)
    if found.run["command"] == "compare":
        if before is not None:
            raise ConfigError(
                f"'{after}' is a comparison already.",
                expected="one comparison, or two audits",
                found=f"a comparison, and --against {before}",
                fix="leave --against out",
            )
        ends = [read_side(Path(found.run["inputs"][role]["ref"])) for role in ("before", "after")]
        return ends[1], ends[0]
    if before is not None:
        return read_side(after), read_side(before)
    reference = _records(found, "against")
    side = read_side(after)
    return side, replace(side, name=f"{after} (reference)", records=reference) if reference else None


def read_side(path: Path, *, scorer: str | None = None, texts: bool = False) -> Side:
    """Return the records of a run's model, or of a log.

    Of an audit the audited model is taken, of a `heal` run the repaired one, or the tuned one where nothing was chosen.

    Args:
        path: A run folder, an Inspect log (`.eval`, `.json`) or samples of lm-eval (`samples_*.jsonl`).
        scorer: Of a log: the scorer that decides.
        texts: Keep prompts and answers.

    Raises:
        DataError: The run is unfinished or has no records, or the log is damaged.
    """
    if is_log(path):
        return _logged(path, scorer, texts=texts)
    found = _finished(path)
    summary = found.summary or {}
    ids = summary.get("model_ids", {})
    wanted = ids.get("repaired") or ids.get("tuned") or "model"
    records = _records(found, wanted, texts=texts)
    if not records:
        raise DataError(
            f"The run '{path}' holds no answers of a model.",
            expected="a run of audit or heal",
            found=f"a run of {found.run['command']}",
            fix="audit the model first",
        )
    known = any(record.score is not None for record in records if record.kind == "harmful")
    primary = str(summary.get("primary") or ("harm_rate" if known else "refusal_rate"))
    further = (summary.get("suite") or {}).get("metrics") or METRICS
    return Side(
        name=str(path),
        digest=file_digest(path / "records.jsonl"),
        records=records,
        primary=primary,
        metrics=tuple(dict.fromkeys([primary, *further])),
        utility=summary.get("utility"),
    )


def _logged(path: Path, scorer: str | None, *, texts: bool) -> Side:
    log = open_log(path, scorer=scorer)
    kept = log.records if texts else tuple(replace(record, prompt="", output="") for record in log.records)
    metrics = tuple(f"score:{name}" if log.higher_is_better.get(name, True) else f"cost:{name}" for name in log.scorers)
    return Side(
        str(path),
        file_digest(path),
        kept,
        metrics[0],
        metrics,
        allowed=_FOREIGN_CONDITIONS,
        log=replace(log, records=kept),
    )


def _finished(folder: Path) -> ReadRun:
    found = read_run(folder)
    if found.summary is None:
        raise unfinished(found)
    return found


def _records(run: ReadRun, model_id: str, *, texts: bool = False) -> tuple[Record, ...]:
    return tuple(record for record in run.records(texts=texts) if record.model_id == model_id)
