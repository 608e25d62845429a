# SPDX-License-Identifier: Apache-2.0
"""Logs of Inspect (`inspect_ai`) read as records, without the package: `.eval` archives and `.json` documents.

Samples stream: one is in memory at a time, beside the records made so far. An epoch is a sample of the item. What
keelwright itself exported comes back as the records that it was.

Source:
    Log files, inspect.aisi.org.uk/eval-logs.html; schema version 2 as written by inspect_ai 0.3.69 and 0.3.285.

Limits:
    Transcripts (events, tool calls) are not kept; a conversation is one prompt and the last answer. Logs that are split
    over shards hold no samples of their own and are refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from keelwright.core.digests import json_digest
from keelwright.core.errors import DataError, MissingError
from keelwright.core.records import Finish, Judgement, Record, with_shared_parts
from keelwright.measure.foreign_scores import flattened, judgement_of, put_first
from keelwright.runs.interop.archive import LARGEST_MEMBER, Archive
from keelwright.runs.interop.foreign import ForeignLog, choose_primary, require_distinct
from keelwright.runs.interop.json_stream import iterate_list, read_without_list

SCHEMA: Final = 2
"""Version of Inspect's log schema that is read and written."""
OURS: Final = "keelwright"
"""Key of a sample's metadata that holds the fields of the record that it was."""

_FINISH: Final[Mapping[str, Finish]] = {"stop": "eos", "max_tokens": "length", "model_length": "length"}
_DECIDES: Final = (
    "temperature", "top_p", "top_k", "max_tokens", "seed", "stop_seqs", "frequency_penalty", "presence_penalty",
    "num_choices", "best_of", "system_message", "reasoning_effort", "reasoning_tokens",
)  # fmt: skip
"""Settings of generation that decide an answer; the rest (retries, connections) decide when it comes."""
_ATTACHED: Final = "attachment://"
_LONGEST_FACT: Final = 200
_HEADER_KEYS: Final = frozenset({"version", "status", "eval", "plan", "stats"})


def read_inspect_log(path: Path, *, scorer: str | None = None) -> ForeignLog:
    """Read a log of Inspect.

    Args:
        path: A `.eval` or a `.json` log.
        scorer: Whose judgement comes first; by default the log's headline, else its first scorer. A part of a score
            of several values is named `scorer.part`.

    Raises:
        MissingError: There is no such file, or it is compressed with Zstandard and nothing here can read that.
        DataError: It is no log, is damaged, has another version, or has a sample twice; the error says where.
        UnsafeInputError: The archive reaches outside itself or would fill the memory.
        ConfigError: It has no such scorer.
    """
    if path.suffix.lower() == ".json":
        _require_file(path)
        header = read_without_list(path, "samples", enough=_HEADER_KEYS, largest=LARGEST_MEMBER)
        header = _checked(header, path)
        return _log(path, header, _numbered(iterate_list(path, "samples", largest=LARGEST_MEMBER), path), scorer)
    with Archive(path) as archive:
        header = _archive_header(archive)
        return _log(path, header, _archived_samples(archive), scorer)


def _log(path: Path, header: Mapping[str, Any], samples: Iterator[tuple[str, Any]], scorer: str | None) -> ForeignLog:
    try:
        return _whole_log(path, header, samples, scorer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # Samples name themselves; what is left is the header.
        raise DataError(
            f"The header of '{path}' cannot be used.",
            expected="the header of a log of Inspect",
            found=f"{type(error).__name__}: {error}",
            fix="copy the log again, or convert it with `inspect log convert`",
        ) from error


def _whole_log(
    path: Path, header: Mapping[str, Any], samples: Iterator[tuple[str, Any]], scorer: str | None
) -> ForeignLog:
    reader = _Reader(path, header)
    read = [reader.record(sample, where) for where, sample in samples]
    found = list(dict.fromkeys([*_named_first(header, reader.scorers), *reader.scorers]))
    primary = choose_primary(scorer, found, str(path))
    if scorer is not None or not reader.all_ours:
        # What keelwright exported has its own order of judgements, which may differ between kinds of items.
        read = [_judged(record, primary) for record in read]
    require_distinct(read, str(path))
    evaluation = header["eval"]
    return ForeignLog(
        source=str(path),
        program=f"inspect {(evaluation.get('packages') or {}).get('inspect_ai', '')}".strip(),
        task=reader.task,
        model=reader.model,
        created=str(evaluation.get("created", "")),
        status=str(header.get("status", "started")),
        primary=primary,
        scorers=tuple(dict.fromkeys([primary, *found])),
        higher_is_better={},
        records=tuple(read),
        questions=reader.questions,
        settings=reader.settings,
        is_ours=reader.all_ours and bool(read),
        notes=tuple(reader.notes(header, read)),
    )


class _Reader:
    """Turns the samples of one log into records, and remembers what it met."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._path = path
        evaluation, plan = header["eval"], header.get("plan") or {}
        dataset = evaluation.get("dataset") or {}
        self.task = str(evaluation.get("task", "task"))
        self.model = str(evaluation.get("model", "model"))
        config = {**(evaluation.get("model_generate_config") or {}), **(plan.get("config") or {})}
        decides = {name: config[name] for name in _DECIDES if config.get(name) is not None}
        # Later releases also write the defaults of a solver; what was passed is the same in all of them.
        steps = [[step["solver"], step.get("params_passed", step.get("params"))] for step in plan.get("steps") or ()]
        self._suite = f"inspect:{self.task}"
        self._suite_digest = json_digest([self.task, evaluation.get("task_version"), dataset.get("name")])
        self._template_digest = json_digest(steps)
        self._decoding_digest = json_digest(decides)
        self._limit = decides.get("max_tokens")
        self._epochs = int((evaluation.get("config") or {}).get("epochs") or 1)
        self.settings = {
            "solver": json.dumps(steps, ensure_ascii=False),
            "generation": json.dumps(decides, ensure_ascii=False),
            "epochs": str(self._epochs),
            **{f"options of {one['name']}": json.dumps(one.get("options")) for one in evaluation.get("scorers") or ()},
        }
        self.scorers: dict[str, None] = {}
        self.questions: dict[str, str] = {}
        self.all_ours = True
        self._counts: Counter[str] = Counter()

    def record(self, sample: Mapping[str, Any], where: str) -> Record:
        """Return one sample's record; its judgements are in the log's order."""
        try:
            attached = sample.get("attachments") or {}
            item_id, epoch = str(sample["id"]), int(sample["epoch"])
            prompt = _prompt(sample["input"], sample.get("choices"), attached)
            metadata = sample.get("metadata") or {}
            output = sample.get("output") or {}
            failed = sample.get("error") is not None
            judgements = self._judgements(sample.get("scores") or {}, attached)
            question = json_digest([prompt, sample.get("target")])
            if self.questions.setdefault(item_id, question) != question:
                self._counts["asked in different words in different epochs"] += 1
            self._counts["marked as invalid"] += sample.get("invalidation") is not None
            known = metadata.get(OURS)
            if isinstance(known, Mapping):
                kept = {name: value for name, value in known.items() if name != "judges"}
                order = [name for name in known.get("judges", ()) if name in judgements] or list(judgements)
                ours = {name: judgements[name] for name in order}
                answer = _answer(output, attached)
                return with_shared_parts(Record(item_id=item_id, prompt=prompt, output=answer, judgements=ours, **kept))
            self.all_ours = False
            self._counts["without an answer, because of an error"] += failed
            self._counts["without any score"] += not judgements and not failed
            return with_shared_parts(self._foreign(sample, item_id, epoch, prompt, judgements))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"'{self._path}', {where}: not a sample of an Inspect log.",
                expected="an object with id, epoch, input, target, output and scores",
                found=f"{type(error).__name__}: {error}",
                fix="copy the log again, or convert it with `inspect log convert`",
            ) from error

    def _foreign(
        self, sample: Mapping[str, Any], item_id: str, epoch: int, prompt: str, judgements: Mapping[str, Judgement]
    ) -> Record:
        metadata, output = sample.get("metadata") or {}, sample.get("output") or {}
        usage = output.get("usage") or {}
        read = usage.get("input_tokens")
        return Record(
            item_id=item_id,
            suite=self._suite,
            suite_digest=self._suite_digest,
            kind="task",
            hazard=str(metadata.get("hazard") or metadata.get("category") or self.task),
            prompt=prompt,
            model_id=self.model,
            revision="not recorded",
            template_digest=self._template_digest,
            decoding_digest=self._decoding_digest,
            output=_answer(output, sample.get("attachments") or {}),
            n_tokens=int(usage.get("output_tokens") or 0),
            finish=_finish(sample, output),
            judgements=dict(judgements),
            cluster_id=_text(metadata.get("cluster_id", metadata.get("cluster"))),
            sample=epoch - 1,
            samples=self._epochs,
            max_new_tokens=self._limit,
            pair_id=_text(metadata.get("pair_id", metadata.get("pair"))),
            facts={str(name): str(value) for name, value in metadata.items() if _is_fact(value)},
            n_prompt_tokens=None if read is None else int(read),
        )

    def _judgements(self, scores: Mapping[str, Any], attached: Mapping[str, str]) -> dict[str, Judgement]:
        found: dict[str, Judgement] = {}
        for name, score in scores.items():
            raw = _resolved(score.get("explanation"), attached)
            label = (score.get("metadata") or {}).get(OURS)
            if isinstance(label, Mapping):
                found[name] = Judgement(label["label"], label["score"], raw)
            else:
                for part, value in flattened(name, score["value"]):
                    found[part] = judgement_of(value, raw=raw)
        self.scorers.update(dict.fromkeys(found))
        return found

    def notes(self, header: Mapping[str, Any], records: Sequence[Record]) -> Iterator[str]:
        """Yield what the person should know about the log."""
        status = header.get("status", "started")
        if status != "success":
            yield f"{self._path}: its status is '{status}', so samples may be missing"
        if header.get("invalidated"):
            yield f"{self._path}: it was marked as invalid"
        for what, count in self._counts.items():
            if count:
                yield f"{self._path}: {count} of {len(records)} samples {what}"


def _judged(record: Record, primary: str) -> Record:
    """Return the record with the primary scorer's judgement first."""
    return replace(record, judgements=put_first(record.judgements, primary, failed=record.finish == "error"))


def _named_first(header: Mapping[str, Any], met: Mapping[str, None]) -> list[str]:
    """Return the scorers that the header names, its headline first, as far as they were met."""
    results = header.get("results") or {}
    headline = results.get("headline") or {}
    named: list[str] = []
    for entry in [headline, *(results.get("scores") or ()), *(header["eval"].get("scorers") or ())]:
        scorer, score = entry.get("scorer") or entry.get("name"), entry.get("score") or entry.get("name")
        # A score of several values has one entry per value, under the value's name.
        named += [f"{scorer}.{score}", str(scorer)]
    return [name for name in dict.fromkeys(named) if name in met]


def _archive_header(archive: Archive) -> dict[str, Any]:
    """Return the header of an `.eval` archive; of one that is still being written, what it began with."""
    names = archive.names()
    for name in ("header.json", "_journal/start.json"):
        if name in names:
            return _checked(_parsed(archive, name), archive.path)
    raise DataError(
        f"'{archive.path}' is not a log of Inspect.",
        expected="an archive with header.json or _journal/start.json",
        found=", ".join(names[:3]) or "an empty archive",
        fix="give a .eval or .json log as `inspect eval` writes it",
    )


def _archived_samples(archive: Archive) -> Iterator[tuple[str, Any]]:
    for name in archive.names():
        if name.startswith("samples/") and name.endswith(".json"):
            yield f"member '{name}'", _parsed(archive, name)


def _numbered(samples: Iterator[Any], path: Path) -> Iterator[tuple[str, Any]]:
    for number, sample in enumerate(samples, 1):
        if not isinstance(sample, dict):
            raise DataError(
                f"'{path}', sample {number}: not a sample of an Inspect log.",
                expected="a JSON object",
                found=type(sample).__name__,
                fix="copy the log again from where it was written",
            )
        yield f"sample {number}", sample


def _parsed(archive: Archive, name: str) -> dict[str, Any]:
    try:
        found = json.loads(archive.read(name))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__} instead of an object")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"'{archive.path}': the member '{name}' is not JSON.",
            expected="a JSON object",
            found=str(error),
            fix="copy the log again from where it was written",
        ) from error
    return found


def _checked(header: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the header, if it is one of a version that is known here and its samples are in this file."""
    version = header.get("version")
    if not isinstance(header.get("eval"), dict) or version is None:
        raise DataError(
            f"'{path}' is not a log of Inspect.",
            expected="a header with the keys version and eval",
            found=f"the keys {', '.join(list(header)[:5]) or 'of an empty object'}",
            fix="give a .eval or .json log as `inspect eval` writes it",
        )
    if version != SCHEMA:
        raise DataError(
            f"'{path}' is a log of another version.",
            expected=f"version {SCHEMA} of Inspect's log schema",
            found=f"version {version}",
            fix="convert it with `inspect log convert` of a release that knows both",
        )
    if header["eval"].get("shards"):
        raise DataError(
            f"'{path}' is split over shards.",
            expected="a log that holds its own samples",
            found="a log that names the logs of its shards",
            fix="give the shards' logs one by one",
        )
    return dict(header)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise MissingError(
            f"There is no file '{path}'.",
            expected="a log file",
            found="a folder" if path.is_dir() else "nothing",
            fix="check the path",
        )


def _prompt(told: object, choices: Sequence[str] | None, attached: Mapping[str, str]) -> str:
    """Return what was asked, as one text: a single user message as it is, a conversation with its roles."""
    if isinstance(told, str):
        text = _resolved(told, attached) or ""
    elif isinstance(told, list):
        said = [(str(message["role"]), _content(message.get("content"), attached)) for message in told]
        text = said[0][1] if [role for role, _ in said] == ["user"] else "\n\n".join(f"{a}: {b}" for a, b in said)
    else:
        raise TypeError(f"input is a {type(told).__name__}")
    options = [f"{chr(ord('A') + index)}) {choice}" for index, choice in enumerate(choices or ())]
    return "\n".join([text, *options])


def _answer(output: Mapping[str, Any], attached: Mapping[str, str]) -> str:
    if output.get("completion") is not None:
        return _resolved(output["completion"], attached) or ""
    choices = output.get("choices") or ()
    return _content(choices[0]["message"].get("content"), attached) if choices else ""


def _content(content: object, attached: Mapping[str, str]) -> str:
    """Return the text of a message; what is no text is named by its type."""
    if isinstance(content, str):
        return _resolved(content, attached) or ""
    parts = content if isinstance(content, list) else []
    return "\n".join(
        _resolved(part.get("text"), attached) or "" if part.get("type") == "text" else f"<{part.get('type')}>"
        for part in parts
    )


def _resolved(text: str | None, attached: Mapping[str, str]) -> str | None:
    """Return a text, from the sample's attachments where it was moved there."""
    if isinstance(text, str) and text.startswith(_ATTACHED):
        return attached.get(text.removeprefix(_ATTACHED), text)
    return text


def _finish(sample: Mapping[str, Any], output: Mapping[str, Any]) -> Finish:
    if sample.get("error") is not None:
        return "error"
    if sample.get("limit") is not None:
        return "length"
    choices = output.get("choices") or ()
    return _FINISH.get(str(choices[0].get("stop_reason")), "eos") if choices else "error"


def _is_fact(value: object) -> bool:
    return isinstance(value, (str, int, float, bool)) and len(str(value)) <= _LONGEST_FACT


def _text(value: object) -> str | None:
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "" else None
