# SPDX-License-Identifier: Apache-2.0
"""Measuring a live model: what is generated, what is kept, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import pytest

from keelwright.core.errors import ConfigError, DataError, ResourceError
from keelwright.core.record_index import RecordIndex
from keelwright.core.records import Generation, Item, Judgement, Record
from keelwright.measure.asking import measure, missing_items
from keelwright.measure.audit import audit, decoding_for, examine
from keelwright.measure.batch_check import check_batches
from keelwright.measure.part import part_of_suite
from keelwright.measure.suites import suite_digest
from keelwright.measure.utility import TaskUtility, TextUtility
from keelwright.models.engines.local import LocalEngine
from keelwright.models.loading import LoadedModel

MakeModel = Callable[..., LoadedModel]


class LengthJudge:
    """Calls an answer a refusal when it has an even number of words."""

    judge_id = "length@1"

    def judge(self, item: Item, generation: Generation) -> Judgement:
        refuses = len(generation.output.split()) % 2 == 0
        return Judgement("refusal_full" if refuses else "safe_completion")


class SmallSuite:
    """Four items of each kind in two areas."""

    name = "small"
    knows_harm = False
    says = "nothing much"
    max_new_tokens = 6

    def items(self) -> Sequence[Item]:
        words = ["the cat", "a lamp sees", "old river", "stone and dog sees a cat"]
        return [
            Item(f"{kind}{i}", "small", kind, f"area {i % 2}", prompt)
            for kind in ("harmful", "benign", "contrast")
            for i, prompt in enumerate(words)
        ]

    def judge(self) -> LengthJudge:
        return LengthJudge()


class CuttingSink(RecordIndex):
    """Fails after a number of records, like a machine that loses power."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def append(self, record: Record) -> None:
        if len(self.records) == self.after:
            raise KeyboardInterrupt
        super().append(record)


class CountingSink(RecordIndex):
    """Counts what is appended."""

    appended = 0

    def append(self, record: Record) -> None:
        self.appended += 1
        super().append(record)


@pytest.fixture
def ask() -> Callable[..., list[Record]]:
    """Measure a model on the small suite."""

    def measured(model: LoadedModel, sink: RecordIndex, *, batch_size: int = 5, **changes: Any) -> list[Record]:
        suite = SmallSuite()
        settings = {
            "model_id": "tuned",
            "digests": suite_digest(suite.items()),
            "decoding": decoding_for(suite, batch_size=batch_size),
        }
        return measure(model, changes.pop("items", suite.items()), suite.judge(), sink, **{**settings, **changes})

    return measured


Ask = Callable[..., list[Record]]


def test_records_come_in_item_order_with_everything_that_made_them(ask: Ask, make_model: MakeModel) -> None:
    sink = RecordIndex()
    records = ask(make_model(), sink)
    items = SmallSuite().items()
    assert [record.item_id for record in records] == [item.item_id for item in items]
    one = records[1]
    assert (one.prompt, one.kind, one.hazard, one.suite) == ("a lamp sees", "harmful", "area 1", "small")
    assert (one.model_id, one.revision, one.suite_digest) == ("tuned", "r0", suite_digest(items))
    assert one.decoding_digest == decoding_for(SmallSuite()).digest()
    assert list(one.judgements) == ["length@1"]
    assert one.n_tokens > 0
    assert {record.key for record in sink.records} == {record.key for record in records}


def test_batch_size_changes_no_record(ask: Ask, make_model: MakeModel) -> None:
    one, other = ask(make_model(), RecordIndex(), batch_size=1), ask(make_model(), RecordIndex(), batch_size=12)
    assert one == other


def test_what_the_sink_has_is_not_generated_again(ask: Ask, make_model: MakeModel) -> None:
    sink = CountingSink()
    first = ask(make_model(), sink)
    assert sink.appended == 12
    assert ask(make_model(), sink) == first
    assert sink.appended == 12


def test_a_run_that_was_cut_goes_on_where_it_stopped(ask: Ask, make_model: MakeModel) -> None:
    cut = CuttingSink(after=7)
    with pytest.raises(KeyboardInterrupt):
        ask(make_model(), cut)
    sink = CountingSink(cut.records)
    assert len(missing_items(SmallSuite().items(), sink, "tuned")) == 5
    assert ask(make_model(), sink) == ask(make_model(), RecordIndex())
    assert sink.appended == 5


@pytest.mark.parametrize(
    ("words", "changes"),
    [("suite", {"digests": "other"}), ("revision", {}), ("decoding", {"decoding": None})],
)
def test_records_made_under_other_conditions_are_not_reused(
    ask: Ask, make_model: MakeModel, words: str, changes: dict[str, Any]
) -> None:
    sink = RecordIndex()
    ask(make_model(), sink)
    if "decoding" in changes:
        changes = {"decoding": decoding_for(SmallSuite(), max_new_tokens=3)}
    model = replace(make_model(), revision="r9") if words == "revision" else make_model()
    with pytest.raises(DataError, match=f"under another {words}") as caught:
        ask(model, sink, **changes)
    assert caught.value.fix == "use another run folder"


def test_decoding_is_greedy_with_the_suites_own_limit() -> None:
    decoding = decoding_for(SmallSuite())
    assert (decoding.temperature, decoding.max_new_tokens) == (0.0, 6)
    assert decoding_for(SmallSuite(), max_new_tokens=9).max_new_tokens == 9


def test_an_audit_gives_rates_areas_and_what_was_asked(make_model: MakeModel) -> None:
    result = audit(make_model(), suite=SmallSuite())
    summary = result.to_summary()
    assert (summary["schema"], summary["command"], summary["model"]) == (1, "audit", "tiny 0")
    assert summary["metrics"]["harm_rate"] is None
    assert summary["metrics"]["refusal_rate"]["n"] == 4
    assert [row["area"] for row in summary["areas"]] == ["area 0", "area 1"]
    assert summary["suite"]["n"] == {"harmful": 4, "benign": 4, "contrast": 4, "task": 0}
    assert summary["suite"]["judge"] == "length@1"
    assert "against" not in summary
    assert summary["seconds"]["model"] > 0


def test_an_audit_against_another_model_is_paired(make_model: MakeModel) -> None:
    sink = RecordIndex()
    result = audit(make_model(1), suite=SmallSuite(), against=make_model(0), sink=sink)
    assert result.against is not None
    assert {record.model_id for record in sink.records} == {"model", "against"}
    rates = {side.model: side.metrics.refusal_rate.value for side in (result.audited, result.against)}
    (change,) = [one for one in result.changes if one.metric == "refusal_rate"]
    assert change.difference == pytest.approx(rates["tiny 1"] - rates["tiny 0"])
    assert set(result.to_summary()["areas"][0]) == {"area", "against", "model"}


def test_a_model_does_not_differ_from_itself(make_model: MakeModel) -> None:
    result = audit(make_model(), suite=SmallSuite(), against=make_model())
    assert {change.difference for change in result.changes} == {0.0}
    assert {change.verdict for change in result.changes} == {"no evidence of change"}


def test_a_limit_holds_for_each_kind(make_model: MakeModel) -> None:
    result = audit(make_model(), suite=SmallSuite(), limit=2)
    assert result.suite["n"] == {"harmful": 2, "benign": 2, "contrast": 2, "task": 0}


def test_a_task_utility_is_asked_and_counted(make_model: MakeModel) -> None:
    tasks = tuple(Item(f"t{i}", "task:x", "task", "x", "the cat", expected="zebra") for i in range(3))
    utility = TaskUtility("task:x", "says", "exact", 4, tasks)
    result = audit(make_model(), suite=SmallSuite(), utility=utility)
    assert result.metrics.utility is not None
    assert (result.metrics.utility.value, result.metrics.utility.n) == (0.0, 3)
    assert result.to_summary()["utility"] == {"name": "task:x", "scorer": "exact", "says": "says"}


def test_a_text_utility_is_the_ratio_to_the_other_model(make_model: MakeModel) -> None:
    text = TextUtility("text:x", "says", "the cat sees a lamp and the old dog sees a river " * 40)
    result = audit(make_model(1), suite=SmallSuite(), against=make_model(0), utility=text, limit=1)
    assert result.against is not None
    assert result.against.metrics.utility.value == 1.0
    assert result.metrics.utility.value != 1.0


def test_a_text_alone_has_no_utility(make_model: MakeModel) -> None:
    with pytest.raises(ConfigError, match="measured against another model") as caught:
        audit(make_model(), suite=SmallSuite(), utility=TextUtility("text:x", "says", "the cat"))
    assert caught.value.fix == "name the model that this one came from"


def test_missing_items_are_those_of_that_model(record: Callable[..., Record]) -> None:
    class OnlyFirst(RecordIndex):
        def find(self, model_id: str, item_ids: Collection[str]) -> list[Record]:
            return [record("harmful0", model_id=model_id)]

    assert len(missing_items(SmallSuite().items(), OnlyFirst(), "tuned")) == 11


def test_some_answers_are_made_again_one_at_a_time(make_model: MakeModel) -> None:
    suite = SmallSuite()
    part = part_of_suite(suite, suite.items(), "d", decoding_for(suite, batch_size=8))
    engine = LocalEngine(make_model())
    checked = examine(lambda: engine, (part,), sink=RecordIndex(), check=5).to_summary()["batch_check"]
    assert (checked["n"], checked["differ"], checked["batch_size"]) == (5, 0, 8)
    assert examine(lambda: engine, (part,), sink=RecordIndex()).to_summary()["batch_check"] is None


def test_an_answer_that_changes_with_the_batch_is_counted(make_model: MakeModel) -> None:
    suite, engine = SmallSuite(), LocalEngine(make_model())
    decoding = decoding_for(suite, batch_size=8)
    records = measure(engine, suite.items(), suite.judge(), RecordIndex(), model_id="m", digests="d", decoding=decoding)
    altered = [replace(one, output="other") if one.item_id == "harmful0" else one for one in records]
    found = check_batches(engine, suite.items(), altered, decoding, count=12)
    assert (found["differ"], found["items"]) == (1, ["harmful0"])


class ClusteredSuite(SmallSuite):
    """Four prompts, each asked forty times over: four clusters."""

    name = "clustered"

    def items(self) -> Sequence[Item]:
        return [
            replace(item, item_id=f"{item.item_id}-{copy}", suite=self.name, cluster_id=item.item_id)
            for item in super().items()
            for copy in range(40)
        ]


def test_headline_rates_count_clusters_and_not_their_items(make_model: MakeModel) -> None:
    found = audit(make_model(), suite=ClusteredSuite())
    (area,) = [one for one in found.areas if one["area"] == "area 0"]
    for estimate in (found.metrics.refusal_rate, found.metrics.over_refusal):
        assert estimate is not None
        assert estimate.n == 160
        # Copies of four prompts say no more than four prompts do.
        assert estimate.high - estimate.low > 0.4
    assert area["model"]["n"] == 80


def test_a_part_that_stands_apart_has_no_headline_rates_and_no_change_of_them(make_model: MakeModel) -> None:
    suite = SmallSuite()
    items = suite.items()
    part = replace(
        part_of_suite(suite, items, suite_digest(items), decoding_for(suite)), headline=False, metrics=("truncated",)
    )
    found = examine(
        lambda: LocalEngine(make_model(1)), (part,), against=lambda: LocalEngine(make_model(2)), sink=RecordIndex()
    )
    assert all(value is None for value in found.metrics.to_mapping().values())
    assert [change.metric for change in found.changes] == ["truncated"]
    assert found.primary == "truncated"
    assert {record.facts["headline"] for record in found.records} == {"no"}


class Hint:
    """A remedy that asks the model for a word and puts it before every prompt."""

    name, says = "hint", "One more answer."

    def __init__(self) -> None:
        self.asked = 0

    def rewrite(self, items: Sequence[Item], ask: Callable[[Sequence[Item]], list[str]]) -> list[Item]:
        self.asked += 1
        (word,) = ask([Item("hint", "hint", "benign", "", "the cat")])
        return [replace(item, prompt=f"{word.split()[0]} {item.prompt}") for item in items]


class Talker:
    """An engine that says how it was asked, and may fail at a remedy's question."""

    name, revision, template_digest, network = "talker", "r", "t", None

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails

    def answer(self, items: Sequence[Item], decoding: Any, **settings: Any) -> list[Generation]:
        found = [
            Generation(
                item.item_id, f"said {item.prompt}", 2, "error" if self.fails and item.suite == "hint" else "eos"
            )
            for item in items
        ]
        if settings.get("on_batch") is not None:
            settings["on_batch"](found)
        return found


def test_a_remedy_asks_once_and_not_again_when_everything_is_answered() -> None:
    suite, sink = SmallSuite(), RecordIndex()
    hint = Hint()
    part = replace(part_of_suite(suite, suite.items(), "d", decoding_for(suite)), mitigation=hint)
    first = examine(Talker, (part,), sink=sink).records
    assert {one.prompt.split()[0] for one in first} == {"said"}
    assert {one.facts["mitigation"] for one in first} == {"hint"}
    assert examine(Talker, (part,), sink=sink).records == first
    assert hint.asked == 1


def test_a_remedy_without_its_answer_stops_the_audit() -> None:
    suite = SmallSuite()
    part = replace(part_of_suite(suite, suite.items(), "d", decoding_for(suite)), mitigation=Hint())
    with pytest.raises(ResourceError, match="'hint' did not get what it asks") as caught:
        examine(lambda: Talker(fails=True), (part,), sink=RecordIndex())
    assert caught.value.fix == "run the same command again: it resumes"
