# SPDX-License-Identifier: Apache-2.0
"""Rows of lm-evaluation-harness, one per document and filter, as records: one per document.

Every metric of every filter becomes a judgement of the document's one answer: `acc`, or `exact_match,strict-match`
where the filter has a name. Metrics that are not defined for a single document (perplexities, corpus scores) are
counted and left out.

Source:
    lm-evaluation-harness 0.4.13, the logged samples of `simple_evaluate` and of `--log_samples`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from keelwright.core.digests import json_digest, text_digest
from keelwright.core.errors import DataError
from keelwright.core.records import Judgement, Record
from keelwright.measure.foreign_scores import judgement_of, put_first

_NO_FILTER: Final = "none"
_LONGEST_FACT: Final = 200


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """What all rows of one task have in common."""

    task: str
    model_id: str
    revision: str
    version: str = "not recorded"
    shots: int | None = None
    template: str = "not recorded"
    """What the prompts were wrapped in: a chat template's digest, a system message."""
    decoding: str = "not recorded"
    max_new_tokens: int | None = None


@dataclass
class TaskRecords:
    """The records of one task as its rows come in."""

    settings: TaskSettings
    questions: dict[str, str] = field(default_factory=dict)
    """Digest of each document's prompt and target, by item."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Metrics that have no value for a single document, with how often they were met."""
    scorers: dict[str, None] = field(default_factory=dict)
    _rows: dict[str, tuple[Mapping[str, Any], str, dict[str, Judgement]]] = field(default_factory=dict)
    _places: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any], where: str) -> None:
        """Take one row.

        Args:
            row: As logged: `doc_id`, `arguments`, `resps`, `filter`, `metrics`, and a value per metric.
            where: File and line, for error texts.

        Raises:
            DataError: It is no such row, or the document was there already with that filter.
        """
        try:
            item = item_id(self.settings.task, row["doc_id"])
            filter_name = str(row.get("filter", _NO_FILTER))
            prompt = _prompt(row["arguments"])
            answer = _answer(row)
            found = {_judge(metric, filter_name): row[metric] for metric in row["metrics"]}
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(
                f"{where}: not a sample of lm-evaluation-harness.",
                expected="an object with doc_id, arguments, resps, metrics and a value per metric",
                found=f"{type(error).__name__}: {error}",
                fix="give a file that `lm_eval --log_samples` wrote",
            ) from error
        key = (item, filter_name)
        if key in self._places:
            raise DataError(
                f"{where}: document {row['doc_id']} of '{self.settings.task}' is there twice.",
                expected=f"each document once with the filter '{filter_name}'",
                found=f"it is also at {self._places[key]}",
                fix="give the samples of one run",
            )
        self._places[key] = where
        judgements = self._rows.setdefault(item, ({"prompt": prompt, "target": row.get("target")}, answer, {}))[2]
        for judge, value in found.items():
            if isinstance(value, (bool, int, float)):
                judgements[judge] = judgement_of(value)
                self.scorers.setdefault(judge)
            else:
                self.left_out[judge] += 1
        self.questions.setdefault(item, json_digest([text_digest(prompt), str(row.get("target"))]))

    def records(self, primary: str) -> list[Record]:
        """Return one record per document, in the order in which they came.

        Args:
            primary: The judgement that comes first.
        """
        settings = self.settings
        digest = json_digest([settings.task, settings.version, settings.shots])
        return [
            Record(
                item_id=item,
                suite=f"lm-eval:{settings.task}",
                suite_digest=digest,
                kind="task",
                hazard=settings.task,
                prompt=known["prompt"],
                model_id=settings.model_id,
                revision=settings.revision,
                template_digest=settings.template,
                decoding_digest=settings.decoding,
                output=answer,
                n_tokens=0,
                finish="eos",
                judgements=put_first(judgements, primary, failed=False),
                max_new_tokens=settings.max_new_tokens,
                facts=_facts(known["target"]),
            )
            for item, (known, answer, judgements) in self._rows.items()
        ]


def item_id(task: str, doc_id: object) -> str:
    """Return the item id of one document."""
    return f"{task}/{doc_id}"


def choose_metric(scorers: Iterable[str]) -> str:
    """Return the judgement that comes first where the user names none: the task's own first metric."""
    return next(iter(scorers), "none")


def _judge(metric: str, filter_name: str) -> str:
    return metric if filter_name == _NO_FILTER else f"{metric},{filter_name}"


def _prompt(arguments: object) -> str:
    """Return the text that the model read: the first argument of the document's first request."""
    first = _arguments(arguments)[0]
    return str(first[0])


def _arguments(arguments: object) -> list[Sequence[Any]]:
    """Return the arguments of each request: as tuples in memory, as nested objects in a file."""
    if isinstance(arguments, Mapping):
        return [list(one.values()) if isinstance(one, Mapping) else one for one in arguments.values()]
    if isinstance(arguments, Sequence) and not isinstance(arguments, str):
        return list(arguments)
    raise TypeError(f"arguments is a {type(arguments).__name__}")


def _answer(row: Mapping[str, Any]) -> str:
    """Return what the model wrote, or the option that it found most likely; nothing where it only read a text."""
    answers = [one[0] if isinstance(one, (list, tuple)) and one else one for one in row["resps"]]
    requests = _arguments(row["arguments"])
    if len(answers) > 1:
        options = [str(request[1]).strip() for request in requests[: len(answers)]]
        # Log-likelihoods are numbers in memory and texts in a file. Where the options are also asked without the
        # question, that comes after all of them: the first of each option is meant.
        logprobs = [float(one[0]) for one in answers]
        return max(dict.fromkeys(options), key=lambda option: logprobs[options.index(option)])
    is_text = isinstance(answers[0], str) and len(requests[0]) > 1
    return str(answers[0]) if is_text else ""


def _facts(target: object) -> dict[str, str]:
    text = str(target)
    return {"target": text} if target is not None and len(text) <= _LONGEST_FACT else {}
