# SPDX-License-Identifier: Apache-2.0
"""Measure a model: generate what is missing, judge it, keep records, estimate.

`measure` is the part that `heal` repeats for every trial; `audit` is the verb for one model, or for two on the same
items.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.protocols import Judge, Progress, RecordSink, Silent, Suite
from keelwright.core.records import Estimate, Generation, Item, Kind, Record
from keelwright.measure.compare import Change, compare_records
from keelwright.measure.memory_sink import ListSink
from keelwright.measure.metrics import Metrics, areas_of, excluded, metrics_of
from keelwright.measure.suites import find_suite, items_within, suite_digest
from keelwright.measure.utility import TaskUtility, TextUtility, Utility, WindowLosses, perplexity_ratio
from keelwright.models.chat import template_digest
from keelwright.models.generation import DecodingConfig, generate
from keelwright.models.loading import LoadedModel, load
from keelwright.models.refs import ModelRef, parse_ref

if TYPE_CHECKING:
    from torch import nn

    ModelLike: TypeAlias = str | Path | ModelRef | LoadedModel | nn.Module

_SILENT = Silent()


def decoding_for(suite: Suite, *, batch_size: int = 32, max_new_tokens: int | None = None) -> DecodingConfig:
    """Return the headline decoding of a suite: greedy, one answer per item, the suite's own limit on tokens."""
    return DecodingConfig(max_new_tokens=max_new_tokens or suite.max_new_tokens, batch_size=batch_size)


def missing_items(items: Sequence[Item], sink: RecordSink, model_id: str) -> list[Item]:
    """Return the items for which the sink has no record of that model: what `measure` would generate."""
    present = {record.item_id for record in sink.find(model_id, [item.item_id for item in items])}
    return [item for item in items if item.item_id not in present]


def measure(
    model: LoadedModel,
    items: Sequence[Item],
    judge: Judge,
    sink: RecordSink,
    *,
    model_id: str,
    suite_digest: str,
    decoding: DecodingConfig,
    progress: Progress = _SILENT,
) -> list[Record]:
    """Return one record per item, generating only those that the sink does not have.

    Args:
        model: The model to ask.
        items: What to ask it.
        judge: Gives each answer its class.
        sink: Where records are kept as each batch finishes, so that a cut run goes on where it stopped.
        model_id: The role or trial that the model plays in the run.
        suite_digest: Digest of the whole suite, kept in each record.
        decoding: How to decode.
        progress: Told of each finished item; the caller names the stage.

    Raises:
        DataError: The sink holds records of these items made under other conditions.
    """
    template, decoded = template_digest(model.tokenizer), decoding.digest()
    found = {record.item_id: record for record in sink.find(model_id, [item.item_id for item in items])}
    conditions = {"suite_digest": suite_digest, "template_digest": template, "decoding_digest": decoded}
    for record in found.values():
        _require_conditions(record, {**conditions, "revision": model.revision})
    progress.advance(len(found))
    by_id = {item.item_id: item for item in items}

    def keep(generations: Sequence[Generation]) -> None:
        for generation in generations:
            item = by_id[generation.item_id]
            record = Record(
                item_id=item.item_id,
                suite=item.suite,
                kind=item.kind,
                hazard=item.hazard,
                prompt=item.prompt,
                model_id=model_id,
                revision=model.revision,
                output=generation.output,
                n_tokens=generation.n_tokens,
                finish=generation.finish,
                judgements={judge.judge_id: judge.judge(item, generation)},
                seed=generation.seed,
                cluster_id=item.cluster_id,
                **conditions,
            )
            sink.append(record)
            found[item.item_id] = record

    waiting = [item for item in items if item.item_id not in found]
    if waiting:
        generate(model, waiting, decoding, on_batch=keep, progress=progress)
    return [found[item.item_id] for item in items]


@dataclass(frozen=True, slots=True)
class Examined:
    """One model under examination: its records and what they come to."""

    model: str
    records: Sequence[Record]
    """Of the suite, then of the task utility."""
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What an audit found."""

    audited: Examined
    against: Examined | None
    changes: Sequence[Change]
    """Paired change from `against` to the audited model."""
    areas: Sequence[dict[str, Any]]
    """The primary metric per hazard area."""
    suite: Mapping[str, Any]
    utility: Mapping[str, str] | None
    seconds: Mapping[str, float]

    @property
    def records(self) -> Sequence[Record]:
        """The audited model's records."""
        return self.audited.records

    @property
    def metrics(self) -> Metrics:
        """The audited model's metrics."""
        return self.audited.metrics

    def to_summary(self) -> dict[str, Any]:
        """Return the audit as plain values, schema 1."""
        summary: dict[str, Any] = {
            "schema": 1,
            "command": "audit",
            "model": self.audited.model,
            "metrics": self.metrics.to_mapping(),
            "areas": list(self.areas),
            "suite": dict(self.suite),
            "utility": None if self.utility is None else dict(self.utility),
            "excluded": excluded(self.records),
            "seconds": dict(self.seconds),
        }
        if self.against is not None:
            summary["against"] = {"model": self.against.model, "metrics": self.against.metrics.to_mapping()}
            summary["changes"] = [change.to_mapping() for change in self.changes]
        return summary


def audit(
    model: ModelLike,
    *,
    suite: str | Suite = "core",
    against: ModelLike | None = None,
    sink: RecordSink | None = None,
    utility: Utility | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    offline: bool = False,
    progress: Progress = _SILENT,
) -> AuditResult:
    """Measure a model's safety, and its change from another model where one is given.

    Args:
        model: Any form of a model reference.
        suite: A suite or its name.
        against: Compare with this model, on the same items.
        sink: Where records go; None keeps them in memory.
        utility: What to measure beside safety; a text needs `against`, as its utility is a ratio.
        limit: At most this many items of each kind.
        max_new_tokens: Longest answer to the suite's items; None takes what the suite asks for.
        batch_size: Answers generated at once.
        device: auto, cpu, cuda or cuda:N.
        offline: Never ask the hub.
        progress: Told what is going on.

    Raises:
        KeelwrightError: What was given is wrong, or the machine lacks something.
    """
    if isinstance(utility, TextUtility) and against is None:
        raise ConfigError(
            "The perplexity of a text is measured against another model.",
            expected="a model to audit against, or a task file",
            found=f"the text '{utility.name}' alone",
            fix="name the model that this one came from",
        )
    chosen = find_suite(suite) if isinstance(suite, str) else suite
    decoding = decoding_for(chosen, batch_size=batch_size, max_new_tokens=max_new_tokens)
    bench = _Bench(chosen, utility, ListSink() if sink is None else sink, limit, decoding, progress)
    seconds: dict[str, float] = {}
    reference: tuple[Examined, WindowLosses | None] | None = None
    if against is not None:
        start = time.perf_counter()
        reference = bench.examine("against", _load(against, device, offline, progress), None)
        seconds["against"] = time.perf_counter() - start
    start = time.perf_counter()
    audited, _ = bench.examine("model", _load(model, device, offline, progress), reference[1] if reference else None)
    seconds["model"] = time.perf_counter() - start
    primary = "harm_rate" if chosen.knows_harm else "refusal_rate"
    sides = (
        {"model": audited.records} if reference is None else {"against": reference[0].records, "model": audited.records}
    )
    return AuditResult(
        audited=audited,
        against=reference[0] if reference else None,
        changes=compare_records(*sides.values(), knows_harm=chosen.knows_harm) if reference else (),
        areas=areas_of(sides, primary),
        suite=bench.says(audited.records),
        utility=None if utility is None else {key: getattr(utility, key) for key in ("name", "scorer", "says")},
        seconds=seconds,
    )


def _load(model: ModelLike, device: str, offline: bool, progress: Progress) -> LoadedModel:
    ref = parse_ref(model)
    progress.stage(f"loading {ref.text}")
    return load(ref, device=device, offline=offline)


@dataclass(frozen=True, slots=True)
class _Bench:
    """What every model of one audit is measured with."""

    suite: Suite
    utility: Utility | None
    sink: RecordSink
    limit: int | None
    decoding: DecodingConfig
    progress: Progress

    def examine(
        self, model_id: str, model: LoadedModel, reference: WindowLosses | None
    ) -> tuple[Examined, WindowLosses | None]:
        """Return what one model comes to; `reference` holds the losses that its own are held against."""
        records = self._ask(self.suite.items(), self.suite.judge(), model_id, model, self.decoding)
        losses: WindowLosses | None = None
        estimate: Estimate | None = None
        if isinstance(self.utility, TaskUtility):
            decoding = DecodingConfig(self.utility.max_new_tokens, self.decoding.batch_size)
            records += self._ask(self.utility.items(), self.utility.judge(), model_id, model, decoding)
        elif isinstance(self.utility, TextUtility):
            losses = self.utility.losses(model, progress=self.progress)
            estimate = perplexity_ratio(reference or losses, losses)
        found = metrics_of(records, knows_harm=self.suite.knows_harm, utility=estimate)
        return Examined(model.name, records, found), losses

    def says(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return what the suite was, and how many items of each kind were asked."""
        n = Counter(record.kind for record in records)
        return {
            "name": self.suite.name,
            "says": self.suite.says,
            "judge": self.suite.judge().judge_id,
            "digest": suite_digest(self.suite.items()),
            "n": {kind: n[kind] for kind in get_args(Kind)},
        }

    def _ask(
        self, items: Sequence[Item], judge: Judge, model_id: str, model: LoadedModel, decoding: DecodingConfig
    ) -> list[Record]:
        asked = items_within(items, self.limit)
        self.progress.stage(f"asking {model.name}", len(asked), "answers")
        return measure(
            model,
            asked,
            judge,
            self.sink,
            model_id=model_id,
            suite_digest=suite_digest(items),
            decoding=decoding,
            progress=self.progress,
        )


def _require_conditions(record: Record, wanted: Mapping[str, str]) -> None:
    for name, value in wanted.items():
        if getattr(record, name) != value:
            words = name.removesuffix("_digest")
            raise DataError(
                f"The run already has an answer of '{record.model_id}' to '{record.item_id}' under another {words}.",
                expected=f"{words} {value}",
                found=f"{words} {getattr(record, name)}",
                fix="use another run folder",
            )
