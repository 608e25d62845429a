# SPDX-License-Identifier: Apache-2.0
"""Ask a model what is not known yet, judge the answers, keep the records.

Judges that read by rule give their verdict as each batch is done. Judges that ask a model, or run code, see the answers
afterwards, many at a time: so a verdict can be added to records that are there already, and judging again never needs
the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from keelwright.core.decoding import DecodingConfig
from keelwright.core.errors import DataError
from keelwright.core.protocols import BatchJudge, Engine, Judge, Progress, RecordSink, Silent
from keelwright.core.records import Generation, Item, Judgement, Record
from keelwright.models.engines.local import LocalEngine
from keelwright.models.loading import LoadedModel

_SILENT = Silent()
_JUDGED_AT_ONCE = 64


def missing_items(items: Sequence[Item], sink: RecordSink, model_id: str, *, samples: int = 1) -> list[Item]:
    """Return the items for which the sink lacks a record of that model: what `measure` would generate."""
    present = {record.key for record in sink.find(model_id, [item.item_id for item in items])}
    return [item for item in items if any((model_id, item.item_id, sample) not in present for sample in range(samples))]


def measure(
    model: Engine | LoadedModel,
    items: Sequence[Item],
    judges: Judge | Sequence[Judge],
    sink: RecordSink,
    *,
    model_id: str,
    digests: str | Mapping[str, str],
    decoding: DecodingConfig,
    conditions: Mapping[str, str] | None = None,
    progress: Progress = _SILENT,
) -> list[Record]:
    """Return `decoding.samples` records per item, making only those that the sink does not have.

    Args:
        model: The model to ask.
        items: What to ask it.
        judges: One or several; the first one's verdict is the record's label.
        sink: Where records are kept as each batch finishes, so that a cut run goes on where it stopped.
        model_id: The role or trial that the model plays in the run.
        digests: Digest of the whole set, by set name; one text where all items are of one set.
        decoding: How to decode.
        conditions: Facts to add to every record, such as the mitigation; comparison refuses where they differ.
        progress: Told of each finished item; the caller names the stage.

    Raises:
        DataError: The sink holds records of these items made under other conditions.
    """
    engine: Engine = LocalEngine(model) if isinstance(model, LoadedModel) else model
    panel = (judges,) if not isinstance(judges, Sequence) else tuple(judges)
    quick = [judge for judge in panel if not _asks_many(judge)]
    by_id = {item.item_id: item for item in items}
    known = RecordKeeper(engine, digests, decoding, model_id=model_id, facts=conditions or {})
    found = {record.key: record for record in sink.find(model_id, list(by_id))}
    for record in found.values():
        known.require(record)
    progress.advance(len(found))

    def keep(generations: Sequence[Generation]) -> None:
        for generation in generations:
            item = by_id[generation.item_id]
            record = known.record(item, generation, {judge.judge_id: judge.judge(item, generation) for judge in quick})
            sink.append(record)
            found[record.key] = record

    have = {(item_id, sample) for _, item_id, sample in found}
    if len(have) < len(items) * decoding.samples:
        engine.answer(items, decoding, have=have, on_batch=keep, progress=progress)
    records = [found[model_id, item.item_id, sample] for item in items for sample in range(decoding.samples)]
    return judge_records(records, by_id, panel, sink, progress=progress)


def judge_records(
    records: Sequence[Record],
    items: Mapping[str, Item],
    panel: Sequence[Judge],
    sink: RecordSink,
    *,
    progress: Progress = _SILENT,
) -> list[Record]:
    """Return the records with a verdict of every judge of the panel, in the panel's order; the model is not needed.

    Args:
        records: What was answered.
        items: What was asked, by item id.
        panel: Judges; verdicts that a record has already are kept. The first one's is the record's label.
        sink: Where records go again when verdicts were added.
        progress: Told of a stage for each judge that has something to do.
    """
    done = {record.key: record for record in records}
    for judge in panel:
        waiting = [record for record in done.values() if judge.judge_id not in record.judgements]
        if not waiting:
            continue
        progress.stage(f"judging with {judge.judge_id}", len(waiting), "answers")
        for start in range(0, len(waiting), _JUDGED_AT_ONCE):
            batch = waiting[start : start + _JUDGED_AT_ONCE]
            verdicts = _verdicts(judge, [(items[record.item_id], generation_of(record)) for record in batch])
            for record, verdict in zip(batch, verdicts, strict=True):
                latest = done[record.key]
                judged = {**latest.judgements, judge.judge_id: verdict}
                done[record.key] = dataclasses.replace(latest, judgements=_in_order(judged, panel))
                sink.append(done[record.key])
            progress.advance(len(batch))
    return [done[record.key] for record in records]


def generation_of(record: Record) -> Generation:
    """Return what the model wrote, as judges read it."""
    return Generation(
        item_id=record.item_id,
        output=record.output,
        n_tokens=record.n_tokens,
        finish=record.finish,
        seed=record.seed,
        sample=record.sample,
        n_prompt_tokens=record.n_prompt_tokens,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class RecordKeeper:
    """What every record of one model under one decoding shares."""

    engine: Engine
    digests: str | Mapping[str, str]
    decoding: DecodingConfig
    model_id: str
    facts: Mapping[str, str]

    def record(self, item: Item, generation: Generation, judgements: Mapping[str, Judgement]) -> Record:
        """Return the record of one answer."""
        return Record(
            item_id=item.item_id,
            suite=item.suite,
            suite_digest=self._digest(item.suite),
            kind=item.kind,
            hazard=item.hazard,
            prompt=item.prompt,
            model_id=self.model_id,
            revision=self.engine.revision,
            template_digest=self.engine.template_digest,
            decoding_digest=self.decoding.digest(),
            output=generation.output,
            n_tokens=generation.n_tokens,
            finish=generation.finish,
            judgements=judgements,
            seed=generation.seed,
            cluster_id=item.cluster_id,
            sample=generation.sample,
            samples=self.decoding.samples,
            max_new_tokens=self.decoding.max_new_tokens,
            pair_id=item.pair_id,
            licence=item.licence,
            facts={**item.facts, **self.facts},
            n_prompt_tokens=generation.n_prompt_tokens,
        )

    def require(self, record: Record) -> None:
        """Raise `DataError` where a record that is there already was made under other conditions."""
        wanted = {
            "suite_digest": self._digest(record.suite),
            "template_digest": self.engine.template_digest,
            "decoding_digest": self.decoding.digest(),
            "revision": self.engine.revision,
        }
        for name, value in wanted.items():
            if getattr(record, name) != value:
                words = name.removesuffix("_digest")
                answer = f"an answer of '{record.model_id}' to '{record.item_id}'"
                raise DataError(
                    f"The run already has {answer} under another {words}.",
                    expected=f"{words} {value}",
                    found=f"{words} {getattr(record, name)}",
                    fix="use another run folder",
                )

    def _digest(self, suite: str) -> str:
        return self.digests if isinstance(self.digests, str) else self.digests[suite]


def _asks_many(judge: Judge) -> TypeGuard[BatchJudge]:
    return hasattr(judge, "judge_all")


def _verdicts(judge: Judge, answers: Sequence[tuple[Item, Generation]]) -> Sequence[Judgement]:
    if _asks_many(judge):
        return judge.judge_all(answers)
    return [judge.judge(item, generation) for item, generation in answers]


def _in_order(judgements: Mapping[str, Judgement], panel: Sequence[Judge]) -> dict[str, Judgement]:
    """Return the panel's verdicts first, in its order, then any others."""
    first = [judge.judge_id for judge in panel if judge.judge_id in judgements]
    return {name: judgements[name] for name in [*first, *judgements]}
