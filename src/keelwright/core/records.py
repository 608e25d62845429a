# SPDX-License-Identifier: Apache-2.0
"""The nouns of measurement: items, generations, judgements, records and estimates.

All are immutable. A record is one JSON line; every metric is a pure function of records, so judging and scoring
again never need the model.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from keelwright.core.errors import DataError

Kind = Literal["harmful", "benign", "contrast", "task"]
"""harmful: should be refused; benign: ordinary; contrast: safe but looks unsafe; task: has a known answer."""

Finish = Literal["eos", "length", "error"]

ResponseClass = Literal[
    "error",
    "empty",
    "incoherent",
    "refusal_full",
    "refusal_partial",
    "comply_harmful",
    "comply_unhelpful",
    "safe_completion",
    "unparsed",
    "correct",
    "wrong",
]
"""Mutually exclusive; decided in this order. `correct` and `wrong` are for items of kind `task`."""

RESPONSE_CLASSES: tuple[str, ...] = get_args(ResponseClass)


@dataclass(frozen=True, slots=True)
class Item:
    """One request of a suite or of a task file."""

    item_id: str
    suite: str
    kind: Kind
    hazard: str
    """Hazard area for harmful and contrast items; topic or task name for the others."""
    prompt: str
    system: str | None = None
    expected: str | None = None
    """The known answer of a task item."""
    scorer: str | None = None
    """How a task item's answer is compared: exact, number, regex or choice."""
    cluster_id: str | None = None
    """Items with the same id are near-duplicates; None means the item stands alone."""
    pair_id: str | None = None
    """Items with the same id are sides of one question: a safe prompt and its contrast, an instruction with and without
    a profile, a problem and its perturbations."""
    licence: str | None = None
    """Of the set that the item comes from, as the set's own page names it."""
    facts: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Short facts that metrics group by, kept in records: `{"domain": "QA", "profile": "none"}`."""
    materials: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What a judge needs beside the prompt and records do not keep: unit tests, a profile, a rubric's instruction."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model wrote for one item."""

    item_id: str
    output: str
    n_tokens: int
    finish: Finish
    seed: int | None = None
    """Seed of a sampled answer; None for greedy."""
    sample: int = 0
    """Which of the item's answers it is, from 0."""
    n_prompt_tokens: int | None = None
    """Tokens that were read; None where the engine does not say."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """One judge's opinion of one answer."""

    label: ResponseClass
    score: float | None = None
    """1 declines ... 5 fulfils fully, where the judge gives it; 0 or 1 for task items."""
    raw: str | None = None
    """The judge's own words, or the rule that decided."""


@dataclass(frozen=True, slots=True)
class Record:
    """One item, one model, one answer, its judgements: one line of `records.jsonl`."""

    item_id: str
    suite: str
    suite_digest: str
    kind: Kind
    hazard: str
    prompt: str
    model_id: str
    """The role or trial the model played in the run: `aligned`, `tuned`, `linear coefficient=0.4`."""
    revision: str
    """Content digest of the model's weights, or hub revision."""
    template_digest: str
    decoding_digest: str
    output: str
    n_tokens: int
    finish: Finish
    judgements: Mapping[str, Judgement]
    """By judge id. The first is the suite's own judge."""
    seed: int | None = None
    cluster_id: str | None = None
    sample: int = 0
    samples: int = 1
    """Answers that were asked for per item; figures of different numbers are not compared."""
    max_new_tokens: int | None = None
    pair_id: str | None = None
    licence: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    n_prompt_tokens: int | None = None

    @property
    def key(self) -> tuple[str, str, int]:
        """What makes a record unique in its run: model, item and sample."""
        return (self.model_id, self.item_id, self.sample)

    @property
    def label(self) -> ResponseClass:
        """The response class given by the suite's own judge; `unparsed` while no judge has seen it."""
        # A loop, not a generator: labels are read millions of times when large runs are compared.
        for one in self.judgements.values():
            return one.label
        return "unparsed"

    @property
    def score(self) -> float | None:
        """The score given by the suite's own judge."""
        return next((one.score for one in self.judgements.values()), None)

    def to_json(self) -> str:
        """Return the record as one JSON line, without the newline."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


_REPEATED = (
    "suite", "suite_digest", "kind", "hazard", "model_id", "revision", "template_digest", "decoding_digest", "finish",
)  # fmt: skip
"""Fields of few values: records that are read share their strings, and so take little memory and compare fast."""

_judgement = functools.lru_cache(maxsize=4096, typed=True)(Judgement)


@functools.lru_cache(maxsize=4096)
def _judgements(*opinions: tuple[str, Judgement]) -> dict[str, Judgement]:
    """Return the verdicts by judge: one mapping, which nobody changes, for all records with the same ones."""
    return dict(opinions)


def with_shared_parts(record: Record) -> Record:
    """Return a record whose repeated strings and verdicts are one object for all records that have them."""
    shared: dict[str, Any] = {name: sys.intern(getattr(record, name)) for name in _REPEATED}
    return dataclasses.replace(record, **shared, judgements=_judgements(*record.judgements.items()))


def record_from_json(line: str, *, where: str, texts: bool = True) -> Record:
    """Read one line of `records.jsonl`.

    Args:
        line: The JSON text.
        where: File and line number, for error texts.
        texts: Keep prompt and answer.

    Raises:
        DataError: The line is not a record.
    """
    try:
        row: dict[str, Any] = json.loads(line)
        row["judgements"] = _judgements(*((judge, _judgement(**one)) for judge, one in row["judgements"].items()))
        row.update((name, sys.intern(row[name])) for name in _REPEATED if name in row)
        if not texts:
            row["prompt"] = row["output"] = ""
        return Record(**row)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{where}: not a record.",
            expected="a JSON object with the fields of keelwright.core.records.Record",
            found=str(error),
            fix="remove the line; the run generates it again when it resumes",
        ) from error


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its interval and its count."""

    value: float
    low: float
    high: float
    n: int

    def to_mapping(self) -> dict[str, float | int]:
        """Return `{"value", "low", "high", "n"}`."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}
