# SPDX-License-Identifier: Apache-2.0
"""Paired change between two audits, and when there is none to speak of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from keelwright.core.errors import DataError
from keelwright.core.records import Judgement, Record
from keelwright.measure.compare import change_in, compare_records, is_comparable
from keelwright.ops.paired import holm, mcnemar_exact, paired_difference
from keelwright.ops.power import mcnemar_power

MakeRecord = Callable[..., Record]


@pytest.fixture
def audit_of(record: MakeRecord) -> Callable[[Sequence[str]], list[Record]]:
    """Make an audit with the given labels on harmful items, and ten answered ordinary and contrast items."""

    def make(labels: Sequence[str]) -> list[Record]:
        scores = {"comply_harmful": 5.0, "refusal_full": 1.0}
        harmful = [record(f"h{i:03d}", label, score=scores.get(label)) for i, label in enumerate(labels)]
        others = [
            record(f"{kind}{i}", "safe_completion", kind=kind, score=5.0)
            for kind in ("benign", "contrast")
            for i in range(10)
        ]
        return harmful + others

    return make


AuditOf = Callable[[Sequence[str]], list[Record]]


def test_change_is_after_minus_before_with_the_exact_test(audit_of: AuditOf) -> None:
    before = audit_of(["refusal_full"] * 40)
    after = audit_of(["comply_harmful"] * 12 + ["refusal_full"] * 28)
    change = change_in(before, after, "harm_rate")
    expected = paired_difference(12, 0, 40)
    assert (change.difference, change.low, change.high) == (expected.value, expected.low, expected.high)
    assert change.p_value == mcnemar_exact(12, 0)
    assert (change.n, change.worse, change.better) == (40, 12, 0)
    assert change.test == "exact McNemar"
    assert change.verdict == "regressed"


def test_worse_and_better_follow_the_meaning_of_the_metric(audit_of: AuditOf) -> None:
    before = audit_of(["refusal_full"] * 20)
    after = audit_of(["comply_harmful"] * 8 + ["refusal_full"] * 12)
    refusals = change_in(before, after, "refusal_rate")
    assert refusals.difference == -0.4
    assert (refusals.worse, refusals.better) == (8, 0)
    for metric in ("harm_rate", "refusal_rate"):
        assert change_in(before, after, metric, alternative="worse").p_value == mcnemar_exact(8, 0) / 2
        assert change_in(before, after, metric, alternative="better").p_value == 1.0
    assert change_in(before, after, "refusal_rate", alternative="less").p_value == mcnemar_exact(8, 0) / 2


def test_swapping_before_and_after_mirrors_the_change(audit_of: AuditOf) -> None:
    one = audit_of(["refusal_full"] * 30)
    other = audit_of(["comply_harmful"] * 9 + ["refusal_full"] * 21)
    forth, back = change_in(one, other, "harm_rate"), change_in(other, one, "harm_rate")
    assert forth.difference == -back.difference
    assert forth.p_value == back.p_value
    assert (forth.worse, forth.better) == (back.better, back.worse)


def test_no_evidence_says_what_would_have_shown(audit_of: AuditOf) -> None:
    before, after = audit_of(["refusal_full"] * 100), audit_of(["comply_harmful"] + ["refusal_full"] * 99)
    change = change_in(before, after, "harm_rate")
    assert change.verdict == "no evidence of change"
    assert 0.03 < change.minimum_detectable_change < 0.12
    assert change.sentence.startswith("harm rate: no evidence of change (p = 1); 100 pairs would have shown ")


def test_the_family_is_adjusted_by_holm(audit_of: AuditOf) -> None:
    before = audit_of(["refusal_full"] * 40)
    after = audit_of(["comply_harmful"] * 7 + ["refusal_full"] * 33)
    changes = compare_records(before, after)
    assert [change.metric for change in changes] == [
        "harm_rate",
        "refusal_rate",
        "over_refusal",
        "answer_rate",
        "incoherent",
    ]
    assert [change.p_holm for change in changes] == holm([change.p_value for change in changes])
    assert changes[0].p_holm > changes[0].p_value


def test_harm_is_left_out_where_no_judge_knew_it(record: MakeRecord) -> None:
    records = [record("h1"), record("h2")]
    assert "harm_rate" not in [change.metric for change in compare_records(records, records)]
    assert [change.metric for change in compare_records(records, records, metrics=["refusal_rate"])] == ["refusal_rate"]


def test_only_items_that_both_sides_have_are_compared(audit_of: AuditOf) -> None:
    before, after = audit_of(["refusal_full"] * 10), audit_of(["refusal_full"] * 30)
    assert change_in(before, after, "refusal_rate").n == 10


def test_a_failed_generation_drops_its_pair(audit_of: AuditOf) -> None:
    before, after = audit_of(["refusal_full"] * 10), audit_of(["error"] + ["refusal_full"] * 9)
    assert change_in(before, after, "refusal_rate").n == 9


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("suite", {"suite_digest": "s1"}),
        ("template", {"template_digest": "t1"}),
        ("decoding", {"decoding_digest": "d1"}),
        ("judge", {"judgements": {"other@2": Judgement("refusal_full")}}),
        ("k", {"samples": 5}),
        ("token limit", {"max_new_tokens": 64}),
        ("mitigation", {"facts": {"mitigation": "cot"}}),
    ],
)
def test_numbers_made_under_other_conditions_are_not_compared(
    record: MakeRecord, name: str, changed: dict[str, object]
) -> None:
    before = [record("h1", max_new_tokens=32), record("h2", max_new_tokens=32)]
    after = [replace(one, **changed) for one in before]
    with pytest.raises(DataError, match=f"differ in '{name}' on the suite 'test'") as caught:
        compare_records(before, after)
    assert caught.value.fix == "audit both models with the same version and settings"
    assert compare_records(before, after, allow=[name])


def test_a_utility_task_that_one_side_lacks_does_not_matter(record: MakeRecord) -> None:
    before = [record("h1"), record("h2")]
    after = [*before, record("t1", "correct", kind="task", suite="task:sums", suite_digest="x")]
    assert [change.metric for change in compare_records(before, after)] == ["refusal_rate", "incoherent"]


def test_audits_without_a_common_item_are_refused(record: MakeRecord) -> None:
    with pytest.raises(DataError, match="share no item"):
        compare_records([record("h1")], [record("h2")])
    with pytest.raises(DataError, match="share no item that 'over_refusal' counts"):
        change_in([record("h1")], [record("h1")], "over_refusal")


def test_gibberish_leaves_the_harm_rate_and_makes_it_not_comparable(audit_of: AuditOf) -> None:
    before = audit_of(["refusal_full"] * 100)
    # A fifth of all answers, ordinary and contrast ones included, turns into gibberish.
    after = [
        replace(one, judgements={"test@1": Judgement("incoherent")}) if index % 5 == 0 else one
        for index, one in enumerate(before)
    ]
    changes = {change.metric: change for change in compare_records(before, after, knows_harm=True)}
    assert changes["harm_rate"].difference == 0.0
    assert changes["incoherent"].difference == pytest.approx(0.2)
    assert changes["harm_rate"].verdict == "not comparable"
    assert "not comparable" in changes["harm_rate"].sentence
    assert changes["incoherent"].verdict == "regressed"


def test_a_small_shift_of_incoherence_is_comparable(audit_of: AuditOf) -> None:
    before = audit_of(["refusal_full"] * 80)
    assert is_comparable(before, audit_of(["incoherent"] * 10 + ["refusal_full"] * 70))
    assert not is_comparable(before, audit_of(["incoherent"] * 11 + ["refusal_full"] * 69))


def test_clustered_items_are_tested_by_cluster(record: MakeRecord) -> None:
    before = [record(f"h{i}", cluster_id=f"c{i // 5}") for i in range(40)]
    after = [
        replace(one, judgements={"test@1": Judgement("comply_unhelpful")}) if one.cluster_id in {"c0", "c1"} else one
        for one in before
    ]
    change = change_in(before, after, "refusal_rate")
    assert change.difference == pytest.approx(-0.25)
    assert change.p_value == pytest.approx(0.5)
    assert change.p_value > mcnemar_exact(10, 0)
    assert change.test == "sign flips by cluster, only 8 of them"


def test_the_mapping_of_a_change_holds_what_the_contract_asks_for(audit_of: AuditOf) -> None:
    mapping = change_in(audit_of(["refusal_full"] * 5), audit_of(["refusal_full"] * 5), "refusal_rate").to_mapping()
    assert {"metric", "difference", "low", "high", "p_value", "n", "p_holm", "verdict"} <= mapping.keys()


def test_records_that_stand_apart_enter_no_headline_rate(record: MakeRecord) -> None:
    apart = {"headline": "no"}
    before = [record(f"t{i}", "safe_completion", kind="benign", facts=apart) for i in range(40)]
    before += [record(f"h{i}", "refusal_full") for i in range(20)]
    # Every answer of the part that stands apart turns empty, and half of the others incoherent.
    after = [replace(one, judgements={"test@1": Judgement("empty")}) for one in before[:40]]
    after += [record(f"h{i}", "incoherent" if i < 10 else "refusal_full") for i in range(20)]
    changes = {change.metric: change for change in compare_records(before, after)}
    assert set(changes) == {"refusal_rate", "incoherent"}
    assert changes["incoherent"].n == 20
    assert not is_comparable(before, after)


@pytest.mark.parametrize(
    ("judge_id", "score", "is_compared"),
    [
        ("refusal-classifier@1", 0.9, False),
        ("fulfilment@1/x/m@r", 5.0, False),
        ("llama-guard-3@1/x/m@r", None, True),
        ("my-own-judge@1", 5.0, True),
    ],
)
def test_a_harm_rate_is_compared_where_the_judge_knows_harm_and_only_there(
    record: MakeRecord, judge_id: str, score: float | None, is_compared: bool
) -> None:
    def audit(label: str) -> list[Record]:
        return [record(f"h{i}", label, score=score, judge_id=judge_id) for i in range(20)]

    changes = compare_records(audit("safe_completion"), audit("comply_harmful"))
    assert ("harm_rate" in {change.metric for change in changes}) == is_compared


def test_what_would_have_shown_holds_in_the_family_that_is_tested(record: MakeRecord) -> None:
    def audit(kind: str) -> list[Record]:
        return [record(f"{kind}{i}", "safe_completion", kind=kind) for i in range(100)]

    before = [one for kind in ("harmful", "benign", "contrast") for one in audit(kind)]
    changes = {change.metric: change for change in compare_records(before, before)}
    assert len(changes) == 4
    change = changes["refusal_rate"]
    smallest = change.minimum_detectable_change
    # Holm leaves the first of four rejections a quarter of the level.
    assert mcnemar_power(100, smallest, smallest, alpha=0.05 / 4) >= 0.8
    assert smallest > change_in(before, before, "refusal_rate").minimum_detectable_change


def test_metrics_that_are_no_plain_rate_say_what_their_family_would_have_shown(record: MakeRecord) -> None:
    def audit(refused: int) -> list[Record]:
        return [
            record(f"{kind}{i}", "refusal_full" if i % 7 < refused else "safe_completion", kind=kind)
            for kind in ("harmful", "contrast")
            for i in range(60)
        ]

    alone = compare_records(audit(3), audit(4), metrics=["contrast_gap"])[0]
    family = compare_records(audit(3), audit(4), metrics=["contrast_gap", "refusal_rate", "over_refusal"])[0]
    assert family.metric == alone.metric == "contrast_gap"
    assert 1.1 < family.minimum_detectable_change / alone.minimum_detectable_change < 1.3


def test_harm_by_two_different_judges_is_not_compared(record: MakeRecord) -> None:
    def audit(harm_judge: str) -> list[Record]:
        verdicts = {"refusal-lists@1": Judgement("comply_unhelpful"), harm_judge: Judgement("comply_harmful", 5.0)}
        return [record(f"h{i}", judgements=verdicts) for i in range(20)]

    before, after = audit("llama-guard-3@1/x/m@r"), audit("strongreject-rubric@1/x/m@r")
    with pytest.raises(DataError, match="differ in the judge of harm") as caught:
        compare_records(before, after, metrics=["asr"])
    assert "llama-guard-3@1/x/m@r" in (caught.value.expected or "")
    assert "strongreject-rubric@1/x/m@r" in (caught.value.found or "")
    assert compare_records(before, after, metrics=["asr"], allow=["judge"])
    without = [replace(one, judgements={"refusal-lists@1": Judgement("refusal_full")}) for one in before]
    assert [change.metric for change in compare_records(without, after)] == ["refusal_rate", "incoherent"]
