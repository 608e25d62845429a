# SPDX-License-Identifier: Apache-2.0
"""Sample files of lm-evaluation-harness (`samples_<task>_<time>.jsonl`) read as records, without the package.

The results file that lies beside (`results_<time>.json`) tells the model, the version of the task, the examples in the
prompt and which metrics are better when higher; without it these are "not recorded", and a note says so.

Source:
    lm-evaluation-harness 0.4.13, `--output_path` with `--log_samples`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from keelwright.core.digests import json_digest
from keelwright.core.errors import DataError, MissingError
from keelwright.measure.lm_eval_rows import TaskRecords, TaskSettings, choose_metric
from keelwright.runs.interop.foreign import ForeignLog, choose_primary

_NAME: Final = re.compile(r"samples_(?P<task>.+)_(?P<time>\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.jsonl")
_TEMPLATE: Final = ("system_instruction_sha", "fewshot_as_multiturn", "chat_template_sha")


def read_lm_eval_samples(path: Path, *, scorer: str | None = None) -> ForeignLog:
    """Read the samples of one task, line by line.

    Args:
        path: A `samples_<task>_<time>.jsonl`.
        scorer: The metric that comes first, with its filter where that has a name (`exact_match,strict-match`); by
            default the task's own first.

    Raises:
        MissingError: There is no such file.
        DataError: A line is no sample, or a document is there twice; the error names the line.
        ConfigError: There is no such metric.
    """
    if not path.is_file():
        raise MissingError(
            f"There is no file '{path}'.",
            expected="a sample file of lm-evaluation-harness",
            found="a folder" if path.is_dir() else "nothing",
            fix="check the path",
        )
    named = _NAME.fullmatch(path.name)
    task = named["task"] if named else path.stem.removeprefix("samples_")
    results = _results(path, named["time"]) if named else None
    found = TaskRecords(_settings(task, path, results or {}))
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                found.add(_parsed(line, f"{path}:{number}"), f"{path}:{number}")
    scorers = tuple(found.scorers)
    primary = choose_primary(scorer, scorers, str(path)) if scorer else choose_metric(scorers)
    better = (results or {}).get("higher_is_better", {}).get(task) or {}
    notes = (
        [] if results is not None else [f"{path}: no results file beside it, so model and settings are not recorded"]
    )
    notes += [f"{path}: '{name}' has no value per document and is left out" for name in found.left_out]
    return ForeignLog(
        source=str(path),
        program=f"lm-eval {(results or {}).get('lm_eval_version', '')}".strip(),
        task=task,
        model=found.settings.model_id,
        created=named["time"] if named else "",
        status="success",
        primary=primary,
        scorers=tuple(dict.fromkeys([primary, *scorers])) if scorers else (),
        higher_is_better={name: bool(better.get(name.partition(",")[0], True)) for name in scorers},
        records=tuple(found.records(primary)),
        questions=found.questions,
        settings=_told(found.settings, results or {}),
        notes=tuple(notes),
    )


def _settings(task: str, path: Path, results: Mapping[str, Any]) -> TaskSettings:
    config = results.get("configs", {}).get(task) or {}
    generation = config.get("generation_kwargs")
    shots = results.get("n-shot", {}).get(task)
    known = bool(results)
    return TaskSettings(
        task=task,
        model_id=str(results.get("model_name") or path.parent.name or "model"),
        revision=str((results.get("config") or {}).get("model_sha") or "not recorded"),
        version=str(results.get("versions", {}).get(task, "not recorded")),
        shots=int(shots) if isinstance(shots, (int, float)) else None,
        template=json_digest([results.get(name) for name in _TEMPLATE]) if known else "not recorded",
        decoding=json_digest(generation or {}) if known else "not recorded",
        max_new_tokens=(generation or {}).get("max_gen_toks"),
    )


def _told(settings: TaskSettings, results: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings in words; empty where no results file says them."""
    if not results:
        return {}
    generation = (results.get("configs", {}).get(settings.task) or {}).get("generation_kwargs") or {}
    return {
        "version": settings.version,
        "examples": str(settings.shots),
        "template": json.dumps({name: results.get(name) for name in _TEMPLATE}),
        "generation": json.dumps(generation, ensure_ascii=False),
    }


def _results(path: Path, time: str) -> dict[str, Any] | None:
    beside = path.with_name(f"results_{time}.json")
    if not beside.is_file():
        return None
    try:
        found = json.loads(beside.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__} instead of an object")
    except ValueError as error:
        raise DataError(
            f"'{beside}' is damaged.",
            expected="the results of lm-evaluation-harness",
            found=str(error),
            fix="copy it again, or move it away: the samples can be read without it",
        ) from error
    return found


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__} instead of an object")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not JSON.",
            expected="one sample of lm-evaluation-harness per line",
            found=str(error),
            fix="copy the file again from where it was written",
        ) from error
    return found
