# SPDX-License-Identifier: Apache-2.0
"""The verb of one model, or of two on the same items: ask, judge, estimate, compare."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast, get_args

from keelwright.core.decoding import DecodingConfig
from keelwright.core.errors import ConfigError, ResourceError
from keelwright.core.protocols import Engine, Progress, RecordSink, Silent, Suite
from keelwright.core.record_index import RecordIndex
from keelwright.core.records import Estimate, Item, Kind, Record
from keelwright.measure.areas import areas_of
from keelwright.measure.asking import measure, missing_items
from keelwright.measure.batch_check import check_batches
from keelwright.measure.compare import Change, compare_areas, compare_records
from keelwright.measure.harness import ask_harness, loaded_model
from keelwright.measure.headline import HEADLINE
from keelwright.measure.limits import sample_items
from keelwright.measure.lm_eval_tasks import LmEvalUtility
from keelwright.measure.metric_table import find_metric
from keelwright.measure.metrics import HEADLINE_FACT, METRICS, Metrics, excluded
from keelwright.measure.part import Mitigation, Part, SetFacts, part_of_suite
from keelwright.measure.suites import find_suite, suite_digest
from keelwright.measure.utility import TaskUtility, TextUtility, Utility, WindowLosses, perplexity_ratio
from keelwright.models.engines.local import LocalEngine
from keelwright.models.loading import LoadedModel, load
from keelwright.models.refs import ModelRef, parse_ref

if TYPE_CHECKING:
    from torch import nn

    ModelLike: TypeAlias = str | Path | ModelRef | LoadedModel | nn.Module | Engine

_SILENT = Silent()

OpenEngine = Callable[[], Engine]
"""Opens a model when it is its turn, so that one is in memory at a time."""


def decoding_for(suite: Suite, *, batch_size: int = 32, max_new_tokens: int | None = None) -> DecodingConfig:
    """Return the headline decoding of a suite: greedy, one answer per item, the suite's own limit on tokens."""
    return DecodingConfig(max_new_tokens=max_new_tokens or suite.max_new_tokens, batch_size=batch_size)


@dataclass(frozen=True, slots=True)
class Figure:
    """One metric of one model in one part of the suite."""

    metric: str
    part: str
    title: str
    counts: str
    unit: str
    higher_is_better: bool
    estimate: Estimate | None
    """None: not measured, since no judged item counts or the metric is not defined on them."""

    def to_mapping(self) -> dict[str, Any]:
        """Return the figure as plain values."""
        plain = {name: getattr(self, name) for name in self.__slots__ if name != "estimate"}
        return {**plain, "estimate": None if self.estimate is None else self.estimate.to_mapping()}


@dataclass(frozen=True, slots=True)
class Examined:
    """One model under examination: its records and what they come to."""

    model: str
    records: Sequence[Record]
    """Of the suite, then of the task utility."""
    metrics: Metrics
    figures: Sequence[Figure] = ()
    """The further metrics of each part."""
    usage: Mapping[str, Any] = field(default_factory=dict)
    """Tokens, requests and cost, where the engine counts them."""
    batches: Mapping[str, Any] | None = None
    """How many answers change when they are asked for one at a time, where that was checked."""


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What an audit found."""

    audited: Examined
    against: Examined | None
    changes: Sequence[Change]
    """Paired change from `against` to the audited model, one family under Holm."""
    areas: Sequence[dict[str, Any]]
    """The primary metric per hazard area."""
    area_changes: Sequence[dict[str, Any]]
    """Its paired change per hazard area, a family under Benjamini and Hochberg."""
    primary: str
    """The metric that decides, declared by the suite before anything is measured."""
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
            "figures": [one.to_mapping() for one in self.audited.figures],
            "primary": self.primary,
            "areas": list(self.areas),
            "suite": dict(self.suite),
            "utility": None if self.utility is None else dict(self.utility),
            "excluded": excluded(self.records),
            "usage": dict(self.audited.usage),
            "batch_check": None if self.audited.batches is None else dict(self.audited.batches),
            "seconds": dict(self.seconds),
        }
        if self.against is not None:
            summary["against"] = {
                "model": self.against.model,
                "metrics": self.against.metrics.to_mapping(),
                "figures": [one.to_mapping() for one in self.against.figures],
                "usage": dict(self.against.usage),
            }
            summary["changes"] = [change.to_mapping() for change in self.changes]
            summary["area_changes"] = list(self.area_changes)
            # A change of safety means little without the change of what the tuning was for.
            summary["grounded"] = self.utility is not None
            summary["family"] = f"{len(self.changes)} metrics, p adjusted by Holm"
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
    seed: int = 0,
    device: str = "cpu",
    offline: bool = False,
    progress: Progress = _SILENT,
) -> AuditResult:
    """Measure a model's safety with a built-in suite, and its change from another model where one is given.

    Args:
        model: Any form of a model reference, or an engine.
        suite: A suite, or the name of a built-in one; `heal.audit` takes every suite.
        against: Compare with this model, on the same items.
        sink: Where records go; None keeps them in memory.
        utility: What to measure beside safety; a text needs `against`, as its utility is a ratio.
        limit: At most this many items of each kind.
        max_new_tokens: Longest answer to the suite's items; None takes what the suite asks for.
        batch_size: Answers generated at once.
        seed: Of the items drawn under a limit.
        device: auto, cpu, cuda or cuda:N.
        offline: Never ask the hub.
        progress: Told what is going on.

    Raises:
        KeelwrightError: What was given is wrong, or the machine lacks something.
    """
    chosen = find_suite(suite) if isinstance(suite, str) else suite
    items = chosen.items()
    part = part_of_suite(
        chosen,
        sample_items(items, limit, seed=seed),
        suite_digest(items),
        decoding_for(chosen, batch_size=batch_size, max_new_tokens=max_new_tokens),
    )

    def opener(one: ModelLike) -> OpenEngine:
        return lambda: _open(one, device, offline, progress)

    return examine(
        opener(model),
        (part,),
        against=None if against is None else opener(against),
        sink=RecordIndex() if sink is None else sink,
        utility=utility,
        limit=limit,
        seed=seed,
        progress=progress,
    )


def examine(
    model: OpenEngine,
    parts: Sequence[Part],
    *,
    sink: RecordSink,
    against: OpenEngine | None = None,
    utility: Utility | None = None,
    limit: int | None = None,
    seed: int = 0,
    check: int = 0,
    progress: Progress = _SILENT,
) -> AuditResult:
    """Measure one or two models on the parts of a suite; each is opened when it is its turn.

    Args:
        model: Opens the model.
        parts: What to ask.
        sink: Where records go, under the model ids `model` and `against`.
        against: Opens the model to compare with.
        utility: What to measure beside safety.
        limit: At most this many items of a task utility.
        seed: Of bootstraps, and of the tasks drawn under a limit.
        check: Answers of the first part to make again one at a time, to see whether batches change them.
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
    bench = Examination(tuple(parts), utility, sink, limit, seed, check, progress)
    seconds: dict[str, float] = {}
    reference: tuple[Examined, WindowLosses | None] | None = None
    if against is not None:
        with _timed(seconds, "against"):
            reference = bench.examine("against", against(), None)
    with _timed(seconds, "model"):
        audited, _ = bench.examine("model", model(), reference[1] if reference else None)
    other = reference[0] if reference else None
    sides = {"model": audited.records} if other is None else {"against": other.records, "model": audited.records}
    primary = primary_of(parts)
    metrics = family_of(parts)
    return AuditResult(
        audited=audited,
        against=other,
        changes=compare_records(other.records, audited.records, metrics=metrics, knows_harm=knows_harm(parts))
        if other
        else (),
        areas=areas_of(sides, primary),
        area_changes=compare_areas(other.records, audited.records, primary) if other else (),
        primary=primary,
        suite=bench.says(audited.records),
        utility=None if utility is None else {key: getattr(utility, key) for key in ("name", "scorer", "says")},
        seconds=seconds,
    )


def knows_harm(parts: Sequence[Part]) -> bool:
    """Whether every part that the headline rates speak of has a judge that knows harm."""
    headline = [part for part in parts if part.headline]
    return bool(headline) and all(part.knows_harm for part in headline)


def primary_of(parts: Sequence[Part]) -> str:
    """Return the metric that decides: the harm rate where a judge knows it, else the refusal rate on harmful requests.

    A suite without harmful requests is decided by the first metric that it names.
    """
    headline = [part for part in parts if part.headline]
    kinds = {item.kind for part in headline for item in part.items}
    if "harmful" in kinds:
        return "harm_rate" if knows_harm(parts) else "refusal_rate"
    if "contrast" in kinds:
        return "over_refusal"
    named = next((part.metrics[0] for part in parts if part.metrics), None)
    return named or ("utility" if "task" in kinds else "answer_rate")


def family_of(parts: Sequence[Part]) -> tuple[str, ...]:
    """Return the metrics that are compared together, the primary one first."""
    further = [name for part in parts for name in part.metrics]
    return tuple(dict.fromkeys([primary_of(parts), *METRICS, *further]))


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _open(model: ModelLike, device: str, offline: bool, progress: Progress) -> Engine:
    if hasattr(model, "answer"):
        return cast("Engine", model)
    ref = parse_ref(cast("str", model))
    progress.stage(f"loading {ref.text}")
    return LocalEngine(load(ref, device=device, offline=offline))


@dataclass(frozen=True, slots=True)
class Examination:
    """What every model of one audit, or of one arena, is measured with."""

    parts: tuple[Part, ...]
    utility: Utility | None
    sink: RecordSink
    limit: int | None
    seed: int
    check: int
    progress: Progress

    def examine(
        self, model_id: str, engine: Engine, reference: WindowLosses | None
    ) -> tuple[Examined, WindowLosses | None]:
        """Return what one model comes to; `reference` holds the losses that its own are held against."""
        by_part = [self._ask(part, model_id, engine) for part in self.parts]
        tasks: list[Record] = []
        losses: WindowLosses | None = None
        estimate: Estimate | None = None
        if isinstance(self.utility, TaskUtility):
            tasks = self._ask(self._task_part(self.utility), model_id, engine)
        elif isinstance(self.utility, LmEvalUtility):
            model = loaded_model(engine, self.utility.name)
            tasks = ask_harness(self.utility, model, self.sink, model_id=model_id, progress=self.progress)
        elif isinstance(self.utility, TextUtility):
            losses = self.utility.losses(loaded_model(engine, self.utility.name), progress=self.progress)
            estimate = perplexity_ratio(reference or losses, losses)
        records = [record for found in by_part for record in found] + tasks
        found = headline_of(self.parts, by_part, tasks, utility=estimate)
        figures = [
            one for part, own in zip(self.parts, by_part, strict=True) for one in figures_of(part, own, self.seed)
        ]
        usage = getattr(engine, "usage", None)
        told = usage.to_mapping() if usage is not None else {}
        return Examined(engine.name, records, found, figures, told, self._batches(engine, by_part[0])), losses

    def _batches(self, engine: Engine, records: Sequence[Record]) -> dict[str, Any] | None:
        part = self.parts[0]
        if self.check == 0:
            return None
        return check_batches(
            engine, part.items, records, part.decoding, count=self.check, seed=self.seed, progress=self.progress
        )

    def says(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return what the suite was, and how many items of each kind were asked."""
        n = Counter(kind for kind, _ in {(record.kind, record.item_id) for record in records})
        return {
            "name": " + ".join(part.name for part in self.parts),
            "says": " ".join(dict.fromkeys(part.says for part in self.parts if part.says)),
            "judge": " + ".join(dict.fromkeys(part.judges[0].judge_id for part in self.parts)),
            "digest": " ".join(one.digest for part in self.parts for one in part.sets),
            "n": {kind: n[kind] for kind in get_args(Kind)},
            "metrics": list(family_of(self.parts)),
            "parts": [_part_words(part) for part in self.parts],
        }

    def _ask(self, part: Part, model_id: str, engine: Engine) -> list[Record]:
        items: Sequence[Item] = part.items
        conditions: dict[str, str] = {}
        if part.mitigation is not None:
            items = self._remedied(part, part.mitigation, model_id, engine)
            conditions["mitigation"] = part.mitigation.name
        if not part.headline:
            conditions[HEADLINE_FACT] = "no"
        self.progress.stage(f"asking {engine.name}", len(items) * part.decoding.samples, "answers")
        return measure(
            engine,
            items,
            part.judges,
            self.sink,
            model_id=model_id,
            digests=part.digests,
            decoding=part.decoding,
            conditions=conditions,
            progress=self.progress,
        )

    def _remedied(self, part: Part, mitigation: Mitigation, model_id: str, engine: Engine) -> list[Item]:
        """Return the items as the remedy asks them; once all are answered, the model is not asked for it again."""
        if not missing_items(part.items, self.sink, model_id, samples=part.decoding.samples):
            known = self.sink.find(model_id, [item.item_id for item in part.items])
            prompts = {record.item_id: record.prompt for record in known}
            return [replace(item, prompt=prompts[item.item_id]) for item in part.items]
        self.progress.stage(f"preparing {mitigation.name} for {part.name}")
        return mitigation.rewrite(part.items, lambda asked: _answers(engine, asked, mitigation.name))

    def _task_part(self, utility: TaskUtility) -> Part:
        items = utility.items()
        name = items[0].suite
        return Part(
            name=utility.name,
            says=utility.says,
            items=tuple(sample_items(items, self.limit, seed=self.seed)),
            judges=(utility.judge(),),
            panel=("task",),
            decoding=DecodingConfig(utility.max_new_tokens, self.parts[0].decoding.batch_size),
            metrics=(),
            sets=(SetFacts(name, utility.name, None, suite_digest(items), len(items)),),
        )


def headline_of(
    parts: Sequence[Part], by_part: Sequence[Sequence[Record]], tasks: Sequence[Record], *, utility: Estimate | None
) -> Metrics:
    """Return the headline rates over the parts that they speak of; the harm rate where all their judges know harm.

    Intervals are those of the same metrics in comparisons: Wilson's for items that stand alone, else by cluster.
    """
    spoken = [own for part, own in zip(parts, by_part, strict=True) if part.headline]
    records = [record for own in spoken for record in own if record.sample == 0] + list(tasks)
    found = {name: HEADLINE[name].estimate(records) for name in METRICS}
    if not knows_harm(parts):
        found["harm_rate"] = None
    if utility is not None:
        found["utility"] = utility
    return Metrics(**found)


def figures_of(part: Part, records: Sequence[Record], seed: int) -> list[Figure]:
    """Return the further metrics of a part from one model's records."""
    found = []
    for name in part.metrics:
        metric = find_metric(name)
        found.append(
            Figure(
                metric=name,
                part=part.name,
                title=metric.title,
                counts=metric.counts,
                unit=metric.unit,
                higher_is_better=metric.higher_is_better,
                estimate=metric.estimate(records, seed=seed),
            )
        )
    return found


def _part_words(part: Part) -> dict[str, Any]:
    decoding = part.decoding
    sampled = f", {decoding.samples} samples at temperature {decoding.temperature:g}" if decoding.temperature else ""
    return {
        "name": part.name,
        "says": part.says,
        "judges": [judge.judge_id for judge in part.judges],
        "items": len(part.items),
        "decoding": f"at most {decoding.max_new_tokens} new tokens{sampled or ', greedy'}",
        "mitigation": part.mitigation.name if part.mitigation else None,
        "metrics": list(part.metrics),
        "sets": [
            {key: getattr(one, key) for key in ("name", "title", "licence", "digest", "n", "caution")}
            for one in part.sets
        ],
    }


def _answers(engine: Engine, items: Sequence[Item], remedy: str) -> list[str]:
    """Answer a remedy's own questions: greedily, with room for a list."""
    found = engine.answer(items, DecodingConfig(max_new_tokens=1024, batch_size=16))
    failed = [one.item_id for one in found if one.finish == "error"]
    if failed:
        raise ResourceError(
            f"The remedy '{remedy}' did not get what it asks the model for.",
            expected=f"{len(found)} answers, to put before the requests",
            found=f"{len(failed)} that could not be had, first '{failed[0]}'",
            fix="run the same command again: it resumes",
        )
    return [one.output for one in found]
