# SPDX-License-Identifier: Apache-2.0
"""Two logs of other programs, compared in pairs."""

import dataclasses

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Judgement, Record
from keelwright.ops.paired import mcnemar_exact
from keelwright.runs.interop.compare_logs import compare_logs, estimates_of, is_log, open_log
from keelwright.runs.interop.foreign import ForeignLog


def log(scores, *, name="match", epochs=1, clusters=None, **changes):
    """Make a log whose item `i` has the score `scores[i]`, or several in its epochs."""
    records = []
    for item, found in enumerate(scores):
        for epoch, score in enumerate(found if isinstance(found, tuple) else (found,)):
            opinion = Judgement("unparsed" if score is None else ("correct" if score == 1 else "wrong"), score)
            records.append(
                Record(
                    str(item), "inspect:quiz", "s", "task", "quiz", "?", "m", "r", "t", "d", "a", 1, "eos",
                    {name: opinion}, sample=epoch, samples=epochs,
                    cluster_id=None if clusters is None else clusters[item],
                )
            )  # fmt: skip
    fields = {
        "source": "log.eval", "program": "inspect", "task": "quiz", "model": "m", "created": "", "status": "success",
        "primary": name, "scorers": (name,), "higher_is_better": {}, "records": tuple(records),
        "questions": {str(item): "q" for item in range(len(scores))}, "settings": {"epochs": str(epochs)},
    }  # fmt: skip
    return ForeignLog(**{**fields, **changes})


def test_yes_and_no_are_tested_by_exact_mcnemar():
    before, after = [1.0] * 20 + [0.0] * 5, [0.0] * 9 + [1.0] * 11 + [1.0] * 1 + [0.0] * 4
    [change] = compare_logs(log(before), log(after))
    assert change.test == "exact McNemar"
    assert change.p_value == mcnemar_exact(1, 9)
    assert (change.difference, change.n, change.worse, change.better) == (-8 / 25, 25, 9, 1)
    assert change.verdict == "regressed"
    assert change.unit == "rate"


def test_epochs_are_averaged_within_an_item_before_items_are_compared():
    before = [(1.0, 0.0)] * 12
    after = [(1.0, 1.0)] * 12
    [change] = compare_logs(log(before, epochs=2), log(after, epochs=2))
    assert (change.n, change.difference) == (12, 0.5)
    # All twelve moved one way: two of the 2^12 ways to swap the sides are as extreme.
    assert change.p_value == pytest.approx(2 / 2**12)
    assert change.verdict == "improved"


def test_numbers_on_another_scale_are_compared_on_that_scale():
    before, after = [7.0, 8.0, 6.0, 9.0] * 5, [5.0, 6.0, 4.0, 7.0] * 5
    [change] = compare_logs(log(before), log(after))
    assert (change.unit, change.difference) == ("score", -2.0)
    assert change.sentence.startswith("match regressed by 2.00 [")


def test_a_scorer_that_is_better_when_lower_regresses_when_it_rises():
    lower = {"higher_is_better": {"match": False}}
    [change] = compare_logs(log([0.0] * 12, **lower), log([1.0] * 12, **lower))
    assert change.verdict == "regressed"


def test_items_of_one_cluster_move_together():
    clusters = [str(item // 4) for item in range(40)]
    before, after = log([1.0] * 40, clusters=clusters), log([0.0] * 4 + [1.0] * 36, clusters=clusters)
    [change] = compare_logs(before, after)
    assert change.clusters == 10
    assert "by cluster" in change.test
    assert change.p_value == 1.0


def test_only_items_with_a_number_on_both_sides_count():
    [change] = compare_logs(log([1.0, None, 1.0, 0.0]), log([1.0, 1.0, 0.0, None]))
    assert change.n == 2


def test_several_scorers_are_one_family():
    def both(first, second):
        one, two = log(first), log(second, name="other")
        merged = [
            dataclasses.replace(a, judgements={**a.judgements, **b.judgements})
            for a, b in zip(one.records, two.records, strict=True)
        ]
        return dataclasses.replace(one, records=tuple(merged), scorers=("match", "other"))

    before, after = both([1.0] * 10, [1.0] * 10), both([0.0] * 6 + [1.0] * 4, [1.0] * 10)
    changes = compare_logs(before, after)
    assert [change.metric for change in changes] == ["match", "other"]
    assert changes[0].p_holm == pytest.approx(2 * changes[0].p_value)
    [alone] = compare_logs(before, after, scorers=["match"])
    assert alone.p_holm == alone.p_value
    with pytest.raises(ConfigError, match="'scorer' is not a known choice"):
        compare_logs(before, after, scorers=["mach"])


def test_settings_that_differ_are_named_and_can_be_allowed():
    before, after = log([1.0] * 4), log([0.0] * 4, settings={"epochs": "1", "generation": '{"temperature": 1}'})
    compare_logs(before, after)  # only one side tells
    before = dataclasses.replace(before, settings={"epochs": "1", "generation": "{}"})
    with pytest.raises(DataError, match="differ in 'generation'") as caught:
        compare_logs(before, after)
    assert '{"temperature": 1} in' in str(caught.value)
    assert len(compare_logs(before, after, allow=["generation"])) == 1
    with pytest.raises(ConfigError, match="'allow'"):
        compare_logs(before, after, allow=["generations"])


def test_other_questions_under_the_same_name_are_refused():
    before, after = log([1.0] * 4), log([0.0] * 4, questions={"2": "other"})
    with pytest.raises(DataError, match="different questions under the name '2'"):
        compare_logs(before, after)
    assert len(compare_logs(before, after, allow=["questions"])) == 1


def test_logs_without_a_common_item_or_scorer_are_refused():
    with pytest.raises(DataError, match="share no scored item") as caught:
        compare_logs(log([1.0]), log([1.0], name="other"))
    assert "1 answers in 'log.eval' with other" in str(caught.value)
    with pytest.raises(DataError, match="share no scored item"):
        compare_logs(log([]), log([]))


def test_each_scorer_has_its_mean_with_interval_and_count():
    found = estimates_of(log([1.0, 0.0, 1.0, 1.0]))["match"]
    assert (found.value, found.n) == (0.75, 4)
    assert found.low < 0.75 < found.high
    assert estimates_of(log([None, None])) == {}


def test_logs_that_keelwright_exported_are_compared_as_runs():
    def exported(label):
        records = [
            Record(
                str(item), "core", "s", "harmful", "theft", "?", "m", "r", "t", "d", "a", 1, "eos",
                {"exact@1": Judgement(label)},
            )
            for item in range(12)
        ]  # fmt: skip
        return log([], records=tuple(records), is_ours=True)

    changes = compare_logs(exported("refusal_full"), exported("comply_unhelpful"))
    assert {change.metric: change.verdict for change in changes}["refusal_rate"] == "regressed"


def test_files_are_known_by_their_ending(tmp_path):
    for name, wanted in (("a.eval", True), ("a.JSON", True), ("a.jsonl", True), ("a.txt", False)):
        (tmp_path / name).write_text("")
        assert is_log(tmp_path / name) is wanted
    assert not is_log(tmp_path)
    with pytest.raises(DataError, match="not a log that can be read") as caught:
        open_log(tmp_path / "a.txt")
    assert ".eval, .json, .jsonl" in str(caught.value)
