# SPDX-License-Identifier: Apache-2.0
"""Runs written as logs of Inspect (`.eval`), so that `inspect view` and its analysis tools open them.

The archive is written here, sample by sample, and not through the package `inspect_ai`: its writer holds a whole log in
memory. Members are deflated, which every release of Inspect reads. What a record says beyond Inspect's own fields lies
in the sample's metadata under `keelwright`, so that the log reads back as the records that it was.

Source:
    Log schema version 2, inspect.aisi.org.uk/eval-logs.html; checked against inspect_ai's own models and reader.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from keelwright.core.config import nearest
from keelwright.core.digests import json_digest
from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Judgement, Record
from keelwright.core.version import __version__
from keelwright.measure.metrics import EXCLUDED_LABELS, RULES
from keelwright.ops.intervals import wilson
from keelwright.runs.interop.inspect_log import OURS, SCHEMA
from keelwright.runs.interop.record_lines import RunRecords
from keelwright.runs.interop.whole_file import written_whole

_STOP: Final = {"eos": "stop", "length": "max_tokens", "error": "unknown"}
_SHORT: Final = 1024
"""Characters of a text in the list of samples; Inspect cuts there too."""
_ELSEWHERE: Final = frozenset({"item_id", "prompt", "output", "judgements"})
"""Fields of a record that have a place of their own in a sample."""
_ID_LENGTH: Final = 22


def write_inspect_log(run: Path, path: Path, *, model_id: str | None = None) -> list[Path]:
    """Write a run as logs of Inspect, one per model.

    Args:
        run: A run folder.
        path: A file that ends in `.eval`, for one model; else a folder, which gets one log per model.
        model_id: Whose records are written; needed for a file when the run has several models.

    Returns:
        The files, in the order of the models.

    Raises:
        DataError: It is no run folder, has no records, or a record is damaged.
        ConfigError: The run has several models and none was chosen, or has no such model.
        StorageError: The file is there already, or cannot be written.
    """
    records = RunRecords(run)
    models = _chosen(records, model_id, run)
    single = path.suffix == ".eval"
    if single and len(models) > 1:
        raise ConfigError(
            f"The run '{run}' has several models, and a log of Inspect holds one.",
            expected=f"one of {', '.join(models)}",
            found=f"{len(models)} models for the file '{path}'",
            fix="name the model, or give a folder: it gets one log per model",
        )
    written = []
    for model in models:
        header = _header_of(records, model)
        target = path if single else path / _file_name(header)
        _write(header, (record for record in records if record.model_id == model), target)
        written.append(target)
    return written


@dataclass
class _Header:
    """What a log says of its run, and what its samples added up to."""

    eval_id: str
    created: datetime.datetime
    finished: bool
    command: str
    model_id: str
    model: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    seed: int
    count: int = 0
    epochs: int = 1
    limit: int | None = None
    revision: str = ""
    suites: dict[str, str] = field(default_factory=dict)
    item_ids: dict[str, None] = field(default_factory=dict)
    judges: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Per judge and metric: answers that it counts, and answers in its denominator."""
    knows_harm: set[str] = field(default_factory=set)
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    """Read and written."""

    def see(self, record: Record) -> None:
        """Add one record to the sums."""
        self.count += 1
        self.epochs = max(self.epochs, record.samples, record.sample + 1)
        self.limit = max(self.limit or 0, record.max_new_tokens or 0) or None
        self.revision = record.revision
        self.suites.setdefault(record.suite, record.suite_digest)
        self.item_ids.setdefault(record.item_id)
        self.tokens = [self.tokens[0] + (record.n_prompt_tokens or 0), self.tokens[1] + record.n_tokens]
        for judge, opinion in record.judgements.items():
            sums = self.judges.setdefault(judge, {})
            seen = dataclasses.replace(record, judgements={judge: opinion})
            for name, rule in RULES.items():
                if record.kind in rule.kinds and opinion.label not in EXCLUDED_LABELS:
                    pair = sums.setdefault(name, [0, 0])
                    pair[0] += rule.counts(seen)
                    pair[1] += 1
            if record.kind == "harmful" and opinion.score is not None:
                self.knows_harm.add(judge)


def _chosen(records: RunRecords, model_id: str | None, run: Path) -> list[str]:
    models = list(records.models())
    if not models:
        raise DataError(
            f"The run '{run}' has no records.",
            expected="a run that asked a model something",
            found="an empty or missing records.jsonl",
            fix="see `keelwright runs ls` for other runs",
        )
    if model_id is None:
        return models
    if model_id not in models:
        raise ConfigError(
            f"The run '{run}' has no model '{model_id}'.",
            expected=f"one of {', '.join(models)}",
            found=model_id,
            fix=nearest(model_id, models),
        )
    return [model_id]


def _header_of(records: RunRecords, model_id: str) -> _Header:
    run = records.run.run
    named = run.get("inputs", {}).get(model_id, {}).get("ref")
    try:
        created = datetime.datetime.fromisoformat(str(run["started"]))
    except ValueError as error:
        raise DataError(
            f"'{records.run.path / 'run.json'}' does not say when the run began.",
            expected="an ISO time under 'started'",
            found=repr(run["started"]),
            fix="the file was changed by hand: restore it",
        ) from error
    return _Header(
        eval_id=_short_id(run, model_id),
        created=created if created.tzinfo else created.replace(tzinfo=datetime.UTC),
        finished=records.run.summary is not None,
        command=str(run["command"]),
        model_id=model_id,
        model=f"keelwright/{named or model_id}",
        config=run.get("config", {}),
        versions=run.get("versions", {}),
        seed=int(run.get("seed", 0)),
    )


def _file_name(header: _Header) -> str:
    """Return a name as Inspect gives it: time, task and model, then the task's id."""
    stamp = header.created.isoformat(timespec="seconds").replace(":", "-").replace("+", "-")
    plain = re.sub(r"[^A-Za-z0-9.=-]+", "-", header.model_id).strip("-.") or "model"
    return f"{stamp}_{header.command}-{plain}_{header.eval_id}.eval"


def _write(header: _Header, records: Iterable[Record], path: Path) -> None:
    with (
        written_whole(path) as stream,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive,
        tempfile.TemporaryFile() as summaries,
    ):
        for record in records:
            if header.count == 0:
                _add(archive, header, "_journal/start.json", _start(header))
            header.see(record)
            sample = _sample(record, header)
            _add(archive, header, f"samples/{record.item_id}_epoch_{record.sample + 1}.json", sample)
            summaries.write(b"[" if header.count == 1 else b",")
            summaries.write(_encoded(_summary(sample)))
        summaries.write(b"]")
        summaries.seek(0)
        with archive.open(_member(header, "summaries.json"), "w") as member:
            shutil.copyfileobj(summaries, member)
        _add(archive, header, "header.json", _finished(header))


def _add(archive: zipfile.ZipFile, header: _Header, name: str, content: Mapping[str, Any]) -> None:
    archive.writestr(_member(header, name), _encoded(content))


def _member(header: _Header, name: str) -> zipfile.ZipInfo:
    # The time of the run, not of the export: the same run gives the same bytes.
    member = zipfile.ZipInfo(name, header.created.timetuple()[:6])
    member.compress_type = zipfile.ZIP_DEFLATED
    return member


def _encoded(content: object) -> bytes:
    # A lone surrogate, which a model's tokenizer can produce, is no UTF-8.
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def _sample(record: Record, header: _Header) -> dict[str, Any]:
    """Return one record as a sample."""
    answer = {"content": record.output, "source": "generate", "role": "assistant", "model": header.model}
    read = record.n_prompt_tokens or 0
    usage = {"input_tokens": read, "output_tokens": record.n_tokens, "total_tokens": read + record.n_tokens}
    failed = record.finish == "error"
    kept = {name: getattr(record, name) for name in _RECORD_FIELDS if name not in _ELSEWHERE}
    metadata = {
        "suite": record.suite,
        "kind": record.kind,
        "hazard": record.hazard,
        "cluster": record.cluster_id,
        "pair": record.pair_id,
        **record.facts,
        OURS: {**kept, "facts": dict(record.facts), "judges": list(record.judgements)},
    }
    sample: dict[str, Any] = {
        "id": record.item_id,
        "epoch": record.sample + 1,
        "input": record.prompt,
        "target": record.facts.get("target", ""),
        "messages": [{"content": record.prompt, "source": "input", "role": "user"}, answer],
        "output": {
            "model": header.model,
            "choices": [{"message": answer, "stop_reason": _STOP[record.finish]}],
            "completion": record.output,
            "usage": usage,
        },
        "scores": {judge: _score(opinion) for judge, opinion in record.judgements.items()},
        "metadata": metadata,
        "store": {},
        "events": [],
        "model_usage": {header.model: usage},
        "uuid": _short_id(header.eval_id, record.item_id, record.sample),
        "attachments": {},
    }
    if failed:
        message = "the model gave no answer"
        sample["error"] = {"message": message, "traceback": message, "traceback_ansi": message}
    return sample


_RECORD_FIELDS: Final = tuple(one.name for one in dataclasses.fields(Record))


def _score(opinion: Judgement) -> dict[str, Any]:
    """Return a judgement as a score: `C` or `I` for tasks, the response class for the rest."""
    letters = {"correct": "C", "wrong": "I"}
    return {
        "value": letters.get(opinion.label, opinion.label),
        "explanation": opinion.raw,
        "metadata": {OURS: {"label": opinion.label, "score": opinion.score}},
    }


def _summary(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the list of samples shows of one."""
    short = {name: value for name, value in sample["metadata"].items() if name != OURS and value is not None}
    scores = {name: {"value": score["value"]} for name, score in sample["scores"].items()}
    failed = sample.get("error")
    return {
        **{name: sample[name] for name in ("id", "epoch", "target", "model_usage", "uuid")},
        "input": sample["input"][:_SHORT],
        "metadata": {name: value[:_SHORT] for name, value in short.items()},
        "scores": scores,
        "completed": True,
        "message_count": len(sample["messages"]),
        **({"error": failed["message"]} if failed else {}),
    }


def _start(header: _Header) -> dict[str, Any]:
    """Return how the log begins, before anything is known of its samples."""
    return {
        "version": SCHEMA,
        "eval": {
            "eval_id": header.eval_id,
            "run_id": header.eval_id,
            "created": header.created.isoformat(),
            "task": f"keelwright-{header.command}",
            "task_id": header.eval_id,
            "task_version": 0,
            "task_attribs": {},
            "task_args": {name: value for name, value in header.config.items() if value is not None},
            "dataset": {"name": "keelwright"},
            "model": header.model,
            "model_generate_config": {},
            "model_args": {"role": header.model_id},
            "config": {},
            "packages": {"keelwright": header.versions.get("keelwright", __version__)},
            "tags": ["keelwright"],
        },
        "plan": {"name": "plan", "steps": [{"solver": "generate", "params": {}}], "config": {}},
    }


def _finished(header: _Header) -> dict[str, Any]:
    """Return the log's header: what it began with, and what its samples came to."""
    begun = _start(header)
    usage = {"input_tokens": header.tokens[0], "output_tokens": header.tokens[1], "total_tokens": sum(header.tokens)}
    scores = [_result(judge, header) for judge in header.judges]
    begun["eval"]["dataset"] = {
        "name": " + ".join(header.suites),
        "samples": len(header.item_ids),
        "sample_ids": list(header.item_ids),
        "shuffled": False,
    }
    begun["eval"]["config"] = {"epochs": header.epochs}
    begun["eval"]["model_args"]["revision"] = header.revision
    begun["eval"]["scorers"] = [
        {"name": score["name"], "metrics": [{"name": name, "options": {}} for name in score["metrics"]]}
        for score in scores
    ]
    begun["plan"]["config"] = {} if header.limit is None else {"max_tokens": header.limit}
    moment = header.created.isoformat()
    return {
        **begun,
        "status": "success" if header.finished else "cancelled",
        "results": {"total_samples": header.count, "completed_samples": header.count, "scores": scores},
        "stats": {"started_at": moment, "completed_at": moment, "model_usage": {header.model: usage}},
        "tags": ["keelwright"],
        "metadata": {OURS: {"suites": header.suites, "seed": header.seed}},
    }


def _result(judge: str, header: _Header) -> dict[str, Any]:
    """Return one judge's metrics: the rates of an audit with their counts, and the interval where items stand alone."""
    metrics: dict[str, Any] = {}
    for name, (counted, n) in header.judges[judge].items():
        if name == "harm_rate" and judge not in header.knows_harm:
            continue
        estimate = wilson(counted, n)
        interval = {"low": estimate.low, "high": estimate.high} if header.epochs == 1 else {}
        metrics[name] = {"name": name, "value": estimate.value, "params": {}, "metadata": {**interval, "n": n}}
    return {"name": judge, "scorer": judge, "params": {}, "metrics": metrics}


def _short_id(*parts: object) -> str:
    """Return an id of the length that Inspect uses, the same for the same input."""
    return hashlib.sha256(json_digest(list(parts)).encode()).hexdigest()[:_ID_LENGTH]
