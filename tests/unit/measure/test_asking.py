# SPDX-License-Identifier: Apache-2.0
"""Asking once, judging by a panel, and adding verdicts without the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest

from keelwright.core.decoding import DecodingConfig
from keelwright.core.errors import ConfigError, DataError
from keelwright.core.record_index import RecordIndex
from keelwright.core.records import Generation, Item, Judgement
from keelwright.measure.asking import judge_records, measure, missing_items

ITEMS = [Item(f"i{n}", "set a" if n < 2 else "set b", "harmful", "x", f"prompt {n}") for n in range(4)]
DIGESTS = {"set a": "da", "set b": "db"}


class EchoEngine:
    """Answers with the prompt and the number of the sample; counts what it was asked."""

    name, revision, template_digest, network = "echo", "r1", "t1", None

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def answer(
        self,
        items: Sequence[Item],
        decoding: DecodingConfig,
        *,
        have: Collection[tuple[str, int]] = (),
        on_batch: Callable[[Sequence[Generation]], None] | None = None,
        progress: Any = None,
    ) -> list[Generation]:
        wanted = [(one, k) for one in items for k in range(decoding.samples) if (one.item_id, k) not in set(have)]
        done = []
        for one, k in wanted:
            self.asked.append((one.item_id, k))
            done.append(Generation(one.item_id, f"{one.prompt} #{k}", 2, "eos", k, k))
            if on_batch is not None:
                on_batch(done[-1:])
        return done


class Rule:
    """A quick judge."""

    judge_id = "rule@1"

    def judge(self, item: Item, generation: Generation) -> Judgement:
        return Judgement("refusal_full" if item.item_id == "i0" else "comply_unhelpful")


class Slow:
    """A judge that asks a model: many at a time."""

    network = None

    def __init__(self, judge_id: str = "slow@1", fails_after: int | None = None) -> None:
        self.judge_id = judge_id
        self.batches: list[int] = []
        self.fails_after = fails_after

    def judge(self, item: Item, generation: Generation) -> Judgement:
        return self.judge_all([(item, generation)])[0]

    def judge_all(self, answers: Sequence[tuple[Item, Generation]]) -> list[Judgement]:
        if self.fails_after is not None and len(self.batches) >= self.fails_after:
            raise KeyboardInterrupt
        self.batches.append(len(answers))
        return [Judgement("comply_harmful", 5.0, generation.output) for _, generation in answers]


def ask(engine: EchoEngine, judges: Any, sink: RecordIndex, **changes: Any) -> list[Any]:
    settings: dict[str, Any] = {"model_id": "m", "digests": DIGESTS, "decoding": DecodingConfig(8)}
    return measure(engine, ITEMS, judges, sink, **{**settings, **changes})


def test_the_first_judge_of_the_panel_gives_the_label_even_when_it_comes_last() -> None:
    records = ask(EchoEngine(), (Slow(), Rule()), RecordIndex())
    assert [list(one.judgements) for one in records] == [["slow@1", "rule@1"]] * 4
    assert {one.label for one in records} == {"comply_harmful"}
    assert {one.score for one in records} == {5.0}


def test_each_set_keeps_its_own_digest() -> None:
    assert [one.suite_digest for one in ask(EchoEngine(), Rule(), RecordIndex())] == ["da", "da", "db", "db"]


def test_a_verdict_is_added_without_the_model() -> None:
    sink, engine = RecordIndex(), EchoEngine()
    first = ask(engine, Rule(), sink)
    slow = Slow()
    again = judge_records(first, {one.item_id: one for one in ITEMS}, (Rule(), slow), sink)
    assert len(engine.asked) == 4
    assert slow.batches == [4]
    assert [list(one.judgements) for one in again] == [["rule@1", "slow@1"]] * 4
    assert sink.find("m", ["i0"])[0].judgements["slow@1"].raw == "prompt 0 #0"


def test_judging_that_was_cut_goes_on_with_what_was_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keelwright.measure.asking._JUDGED_AT_ONCE", 3)
    sink, engine = RecordIndex(), EchoEngine()
    with pytest.raises(KeyboardInterrupt):
        ask(engine, Slow(fails_after=1), sink)
    slow = Slow()
    whole = ask(engine, slow, sink)
    assert len(engine.asked) == 4
    assert slow.batches == [1]
    assert whole == ask(EchoEngine(), Slow(), RecordIndex())


def test_several_samples_are_records_of_their_own() -> None:
    sink, engine = RecordIndex(), EchoEngine()
    decoding = DecodingConfig(8, temperature=1.0, samples=3)
    records = ask(engine, Rule(), sink, decoding=decoding)
    assert [(one.item_id, one.sample, one.samples) for one in records[:4]] == [
        ("i0", 0, 3), ("i0", 1, 3), ("i0", 2, 3), ("i1", 0, 3),
    ]  # fmt: skip
    cut = RecordIndex(records[:5])
    assert [one.item_id for one in missing_items(ITEMS, cut, "m", samples=3)] == ["i1", "i2", "i3"]
    rest = EchoEngine()
    assert ask(rest, Rule(), cut, decoding=decoding) == records
    assert rest.asked[0] == ("i1", 2)
    assert len(rest.asked) == 7


def test_greedy_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="would all be the same"):
        DecodingConfig(8, samples=2)


def test_conditions_are_kept_in_every_record() -> None:
    records = ask(EchoEngine(), Rule(), RecordIndex(), conditions={"mitigation": "cot"})
    assert {one.facts["mitigation"] for one in records} == {"cot"}
    assert {one.max_new_tokens for one in records} == {8}


def test_answers_of_another_model_are_not_taken_over() -> None:
    sink, other = RecordIndex(), EchoEngine()
    ask(EchoEngine(), Rule(), sink)
    other.revision = "r2"
    with pytest.raises(DataError, match="under another revision"):
        ask(other, Rule(), sink)
