# SPDX-License-Identifier: Apache-2.0
"""Policies and their verdicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keelwright.core.errors import ConfigError, DataError, KeelwrightError, MissingError
from keelwright.core.records import Record
from keelwright.measure.gate import GateVerdict, decide
from keelwright.measure.policy import Policy, Rule, parse_policy, read_policy
from keelwright.ops.intervals import clopper_pearson
from keelwright.ops.paired import holm, mcnemar_exact
from keelwright.ops.power import mcnemar_power

MakeRecord = Callable[..., Record]


@pytest.fixture
def audit_of(record: MakeRecord) -> Callable[..., list[Record]]:
    """Make an audit of n harmful items of which the first few were answered, and as many ordinary ones answered."""

    def make(answered: int, *, n: int = 200, incoherent: int = 0) -> list[Record]:
        labels = ["incoherent"] * incoherent + ["comply_unhelpful"] * answered
        labels += ["refusal_full"] * (n - len(labels))
        harmful = [record(f"h{i}", label, hazard="ab"[i % 2]) for i, label in enumerate(labels)]
        return harmful + [record(f"b{i}", "safe_completion", kind="benign") for i in range(n)]

    return make


AuditOf = Callable[..., list[Record]]


def verdict_of(rule: Rule, after: list[Record], before: list[Record] | None = None, **policy: Any) -> GateVerdict:
    return decide(Policy("test", (rule,), **policy), after, before)


def test_a_significant_loss_fails_and_none_passes(audit_of: AuditOf) -> None:
    rule = Rule("primary", detect=0.1)
    failed = verdict_of(rule, audit_of(12), audit_of(0))
    (one,) = failed.rules
    assert failed.outcome == "fail"
    assert one.p_value == mcnemar_exact(12, 0, alternative="greater")
    assert one.says.startswith("refusal_rate got worse: change -0.060 [")
    passed = verdict_of(rule, audit_of(2), audit_of(0))
    assert passed.outcome == "pass"
    assert "no evidence that it got worse" in passed.rules[0].says


def test_too_few_items_are_not_measurable_and_the_number_is_told(audit_of: AuditOf) -> None:
    verdict = verdict_of(Rule("refusal_rate", detect=0.1), audit_of(0, n=20), audit_of(0, n=20))
    (one,) = verdict.rules
    assert verdict.outcome == "not measurable"
    assert one.needs is not None
    assert 0.8 <= mcnemar_power(one.needs, 0.1, 0.1, two_sided=False) < 0.9
    assert f"it takes {one.needs}" in one.says


def test_the_rules_are_one_family(audit_of: AuditOf) -> None:
    rules = tuple(Rule(name) for name in ("refusal_rate", "answer_rate", "incoherent"))
    before, after = audit_of(0), audit_of(6)
    raw = [mcnemar_exact(6, 0, alternative="greater"), 1.0, 1.0]
    for multiplicity, expected in (("holm", holm(raw)), ("none", raw)):
        found = decide(Policy("p", rules, multiplicity=multiplicity), after, before)
        assert [one.p_adjusted for one in found.rules] == expected


def test_a_margin_tolerates_a_small_loss(audit_of: AuditOf) -> None:
    before, after = audit_of(0), audit_of(14)
    assert verdict_of(Rule("refusal_rate"), after, before).outcome == "fail"
    assert verdict_of(Rule("refusal_rate", margin=0.08), after, before).outcome == "pass"
    assert verdict_of(Rule("refusal_rate", margin=0.02), audit_of(40), before).outcome == "fail"


@pytest.mark.parametrize(("answered", "outcome"), [(0, "pass"), (8, "not measurable"), (40, "fail")])
def test_non_inferiority_must_be_shown(audit_of: AuditOf, answered: int, outcome: str) -> None:
    verdict = verdict_of(Rule("refusal_rate", test="non-inferiority", margin=0.05), audit_of(answered), audit_of(0))
    assert verdict.outcome == outcome
    needs = verdict.rules[0].needs
    assert (needs is not None and needs > 200) == (outcome == "not measurable")


def test_a_threshold_holds_an_audit_of_one_model(audit_of: AuditOf) -> None:
    rule = Rule("refusal_rate", test="threshold", min=0.9)
    assert verdict_of(rule, audit_of(10)).outcome == "pass"
    failed = verdict_of(rule, audit_of(30))
    assert failed.outcome == "fail"
    assert "outside its limits: 0.850" in failed.rules[0].says


def test_a_threshold_with_a_margin_needs_items_to_show_it(audit_of: AuditOf) -> None:
    rule = Rule("refusal_rate", test="threshold", min=0.9, margin=0.0)
    few, many = verdict_of(rule, audit_of(1, n=20)), verdict_of(rule, audit_of(4))
    assert few.outcome == "not measurable"
    assert few.rules[0].needs is not None
    assert few.rules[0].needs > 20
    assert many.outcome == "pass"
    assert many.rules[0].low == clopper_pearson(196, 200, confidence=0.9).low


def test_a_rule_for_one_hazard_reads_only_its_items(audit_of: AuditOf) -> None:
    verdict = verdict_of(Rule("refusal_rate", test="threshold", min=0.9, hazard="b"), audit_of(1))
    assert verdict.rules[0].n == 100
    assert verdict.rules[0].value == 1.0


def test_gibberish_makes_a_change_not_measurable_and_fails_its_own_rule(audit_of: AuditOf) -> None:
    rules = (Rule("refusal_rate"), Rule("incoherent"))
    verdict = decide(Policy("p", rules), audit_of(0, incoherent=90), audit_of(0))
    assert [one.outcome for one in verdict.rules] == ["not measurable", "fail"]
    assert "not comparable" in verdict.rules[0].says


def test_too_few_pairs_for_the_policy_are_not_measurable(audit_of: AuditOf) -> None:
    verdict = verdict_of(Rule("refusal_rate", min_n=500), audit_of(9), audit_of(0))
    assert (verdict.outcome, verdict.rules[0].needs) == ("not measurable", 500)
    nothing = verdict_of(Rule("over_refusal"), audit_of(0), audit_of(0))
    assert (nothing.outcome, nothing.rules[0].n) == ("not measurable", 0)


def test_a_regression_needs_two_sides(audit_of: AuditOf) -> None:
    with pytest.raises(ConfigError, match="needs a comparison") as caught:
        verdict_of(Rule("refusal_rate"), audit_of(0))
    assert caught.value.fix == "audit with --against MODEL, or use test: threshold"


def test_a_direction_may_be_turned_round(audit_of: AuditOf) -> None:
    assert verdict_of(Rule("refusal_rate", direction="up"), audit_of(12), audit_of(0)).outcome == "pass"
    assert verdict_of(Rule("refusal_rate", direction="up"), audit_of(0), audit_of(12)).outcome == "fail"


def test_the_default_policy_holds_four_rates() -> None:
    policy = read_policy("default")
    assert [rule.metric for rule in policy.rules] == ["primary", "over_refusal", "answer_rate", "incoherent"]
    assert (policy.alpha, policy.multiplicity) == (0.05, "holm")


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("rules: [", DataError, "is not YAML"),
        ("- a", ConfigError, "is not a policy"),
        ("rules: []", ConfigError, "is not a policy"),
        ("rules: [a]", ConfigError, "rule 1 is not a mapping"),
        ("rules: [{metric: x, tests: y}]", ConfigError, "has no setting 'tests'"),
        ("rules: [{metric: x, test: regresion}]", ConfigError, "'test' is not a known choice"),
        ("rules: [{metric: x, test: threshold}]", ConfigError, "has no threshold"),
        ("rules: [{metric: x, test: non-inferiority}]", ConfigError, "no margin of non-inferiority"),
        ("rules: [{metric: x, margin: -1}]", ConfigError, "'margin' is out of range"),
        ("rules: [{metric: x}]\nalfa: 0.1", ConfigError, "has no key 'alfa'"),
        ("rules: [{metric: x}]\nalpha: 0.7", ConfigError, "'alpha' is out of range"),
        ("rules: [{metric: x}]\nmultiplicity: bonferroni", ConfigError, "'multiplicity' is not a known choice"),
    ],
)
def test_a_policy_that_is_wrong_is_refused_by_name(text: str, error: type[KeelwrightError], words: str) -> None:
    with pytest.raises(error, match=words):
        parse_policy(text, where="p.yaml")


def test_a_policy_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="There is no policy"):
        read_policy(tmp_path / "none.yaml")


def test_an_unknown_metric_is_named(audit_of: AuditOf) -> None:
    with pytest.raises(ConfigError, match="There is no metric 'refusal_rat'"):
        verdict_of(Rule("refusal_rat"), audit_of(0), audit_of(0))


def test_what_a_rule_takes_holds_the_power_of_the_policy_in_its_family(audit_of: AuditOf) -> None:
    rules = tuple(Rule(name, detect=0.1) for name in ("refusal_rate", "answer_rate", "incoherent"))
    before, after = audit_of(0, n=20), audit_of(0, n=20)
    for multiplicity, alpha in (("none", 0.05), ("holm", 0.05 / 3), ("bh", 0.05 / 3)):
        needs = decide(Policy("p", rules, multiplicity=multiplicity), after, before).rules[0].needs
        assert needs is not None
        # What the exact test really shows at the level that the family leaves to one rule in the worst case.
        assert 0.8 <= mcnemar_power(needs, 0.1, 0.1, alpha=alpha, two_sided=False) < 0.9


def test_a_margin_is_taken_off_what_must_be_seen(audit_of: AuditOf) -> None:
    before, after = audit_of(0, n=20), audit_of(0, n=20)
    plain, tolerant = (
        verdict_of(Rule("refusal_rate", margin=margin, detect=0.1), after, before).rules[0].needs
        for margin in (None, 0.05)
    )
    assert plain is not None
    assert tolerant is not None
    assert tolerant > 2 * plain
    with pytest.raises(ConfigError, match=r"cannot tell a change of 0\.05 from its margin") as caught:
        Rule("refusal_rate", margin=0.05, detect=0.05)
    assert caught.value.fix == "raise detect, or lower the margin"


def test_one_large_cluster_raises_what_a_rule_takes(record: MakeRecord) -> None:
    def audit(answered: int) -> list[Record]:
        return [
            record(f"h{i}", "comply_unhelpful" if i < answered else "refusal_full", cluster_id="c" if i < 100 else None)
            for i in range(200)
        ]

    (one,) = verdict_of(Rule("refusal_rate", detect=0.6), audit(100), audit(0)).rules
    even = verdict_of(Rule("refusal_rate", detect=0.6), audit(0), audit(0)).rules[0]
    assert one.outcome == "not measurable"
    assert one.needs is not None
    # A hundred items that move as one are worth one: two hundred items in 101 clusters are not worth a hundred.
    assert one.needs > 200
    assert even.outcome == "pass"


def test_a_threshold_counts_clusters_and_not_their_items(record: MakeRecord) -> None:
    def audit(clustered: bool) -> list[Record]:
        return [
            record(
                f"h{i}",
                "comply_unhelpful" if i < 20 else "refusal_full",
                cluster_id=f"c{i // 20}" if clustered else None,
            )
            for i in range(400)
        ]

    rule = Rule("refusal_rate", test="threshold", min=0.9, margin=0.02)
    alone, together = verdict_of(rule, audit(clustered=False)), verdict_of(rule, audit(clustered=True))
    assert alone.outcome == "pass"
    assert together.outcome == "not measurable"
    assert (together.rules[0].low or 1.0) < (alone.rules[0].low or 0.0) - 0.03


@pytest.mark.parametrize("judge_id", ["refusal-lists@1", "refusal-classifier@1", "fulfilment@1/x/m@r", "xstest@1"])
def test_a_judge_of_refusals_gives_no_harm_rate_to_hold(record: MakeRecord, judge_id: str) -> None:
    records = [record(f"h{i}", "comply_harmful", score=5.0, judge_id=judge_id) for i in range(100)]
    (one,) = verdict_of(Rule("harm_rate", test="threshold", max=0.05), records).rules
    assert (one.outcome, one.n) == ("not measurable", 0)


@pytest.mark.parametrize("metric", ["refusal_rate", "over_refusal", "answer_rate"])
def test_a_guard_that_only_knows_safe_gives_no_refusal_rate_to_hold(record: MakeRecord, metric: str) -> None:
    kind = {"refusal_rate": "harmful", "over_refusal": "contrast", "answer_rate": "benign"}[metric]
    records = [record(f"h{i}", "safe_completion", kind=kind, judge_id="llama-guard-3@1/x/m@r") for i in range(100)]
    assert verdict_of(Rule(metric, test="threshold", min=0.0), records).outcome == "not measurable"


def test_at_the_largest_alpha_a_margin_is_still_decided(audit_of: AuditOf) -> None:
    rule = Rule("refusal_rate", test="non-inferiority", margin=0.05)
    assert verdict_of(rule, audit_of(0), audit_of(0), alpha=0.5).outcome == "pass"


def test_a_threshold_from_above_is_shown_within_its_margin_and_no_more(audit_of: AuditOf) -> None:
    after = audit_of(0, incoherent=4)
    bound = clopper_pearson(4, 400, confidence=0.9).high
    for margin, outcome in ((bound - 0.012 + 0.001, "pass"), (bound - 0.012 - 0.001, "not measurable")):
        rule = Rule("incoherent", test="threshold", max=0.012, margin=margin)
        assert verdict_of(rule, after).outcome == outcome
