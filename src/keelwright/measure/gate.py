# SPDX-License-Identifier: Apache-2.0
"""From a policy and records to verdicts: pass, fail, or not measurable with the number of items that it would take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from keelwright.core.errors import ConfigError
from keelwright.core.records import Estimate, Record
from keelwright.measure.change import ALPHA, POWER, Change, change_of
from keelwright.measure.compare import STAND_ALONE, is_comparable
from keelwright.measure.metric import Metric, dependence
from keelwright.measure.metric_table import find_metric
from keelwright.measure.policy import Policy, Rule
from keelwright.ops.intervals import clopper_pearson, normal_quantile, two_sided_z
from keelwright.ops.paired import benjamini_hochberg, holm, required_pairs
from keelwright.ops.power import mcnemar_power

Outcome = Literal["pass", "fail", "not measurable"]

_MOST_COUNTED: Final = 20_000
"""Discordant pairs up to which power is counted; beyond, the normal formula is as good."""


@dataclass(frozen=True, slots=True)
class RuleVerdict:
    """What became of one rule."""

    rule: Rule
    metric: str
    outcome: Outcome
    says: str
    """The verdict in one sentence, with what was expected and what was found."""
    n: int
    needs: int | None = None
    """Items or pairs that would be needed, where there are too few."""
    value: float | None = None
    """The value of a threshold rule, the change of the others."""
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    p_adjusted: float | None = None

    def to_mapping(self) -> dict[str, Any]:
        """Return the verdict as plain values."""
        return {**dataclasses.asdict(self), "rule": dataclasses.asdict(self.rule)}


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """What became of a policy: `fail` where a rule fails, else `not measurable` where a rule is not."""

    policy: Policy
    rules: tuple[RuleVerdict, ...]

    @property
    def outcome(self) -> Outcome:
        """The verdict over all rules."""
        found = {one.outcome for one in self.rules}
        return "fail" if "fail" in found else "not measurable" if "not measurable" in found else "pass"


def decide(
    policy: Policy, after: Sequence[Record], before: Sequence[Record] | None = None, *, primary: str = "refusal_rate"
) -> GateVerdict:
    """Return the verdict of a policy on an audit, or on the change between two.

    Args:
        policy: What must hold.
        after: Records of the model in question.
        before: Records of the model it came from, made under the same conditions; None where there is none.
        primary: The metric that `primary` in a rule stands for.

    Raises:
        ConfigError: A rule needs a comparison and there is none, or names no metric.
    """
    drafts = [_draft(policy, rule, after, before, primary) for rule in policy.rules]
    tested = [index for index, one in enumerate(drafts) if one.p_value is not None]
    p_values = [float(drafts[index].p_value or 0.0) for index in tested]
    for index, adjusted in zip(tested, _ADJUST[policy.multiplicity](p_values), strict=True):
        drafts[index] = _with_family(policy, drafts[index], adjusted)
    return GateVerdict(policy, tuple(drafts))


_ADJUST: Final[Mapping[str, Callable[[Sequence[float]], list[float]]]] = {
    "holm": holm,
    "bh": benjamini_hochberg,
    "none": list,
}


def _draft(
    policy: Policy, rule: Rule, after: Sequence[Record], before: Sequence[Record] | None, primary: str
) -> RuleVerdict:
    name = primary if rule.metric == "primary" else rule.metric
    metric = find_metric(name)
    if rule.direction != "auto":
        metric = dataclasses.replace(metric, higher_is_better=rule.direction == "down")
    chosen = _chosen(rule, after)
    if rule.test == "threshold":
        return _threshold(policy, rule, metric, chosen)
    if before is None:
        raise ConfigError(
            f"The rule '{rule.test}' for '{name}' needs a comparison.",
            expected="an audit made with --against, or a run of compare",
            found="an audit of one model",
            fix="audit with --against MODEL, or use test: threshold",
        )
    change = change_of(metric, _chosen(rule, before), chosen, alternative="worse")
    if change is None:
        return RuleVerdict(rule, name, "not measurable", f"{name}: no pair of items that it counts.", 0, rule.min_n)
    if name not in STAND_ALONE and not is_comparable(before, after):
        says = f"{name}: not comparable, because the share of incoherent answers moved by more than 10 points."
        return RuleVerdict(rule, name, "not measurable", says, change.n)
    if change.n < rule.min_n:
        return RuleVerdict(
            rule,
            name,
            "not measurable",
            f"{name}: {change.n} pairs, the policy asks for {rule.min_n}.",
            change.n,
            rule.min_n,
        )
    return (_regression if rule.test == "regression" else _non_inferiority)(policy, rule, metric, change)


def _chosen(rule: Rule, records: Sequence[Record]) -> list[Record]:
    return [one for one in records if rule.hazard is None or one.hazard == rule.hazard]


def _regression(policy: Policy, rule: Rule, metric: Metric, change: Change) -> RuleVerdict:
    """Return the verdict with its raw p-value; the family's adjustment may turn a failure into a pass."""
    p_value = change.p_value if not rule.margin else _p_beyond(change, metric, rule.margin)
    needs = _pairs_to_detect(policy, rule, change)
    return RuleVerdict(
        rule, change.metric, "pass", "", change.n, needs, change.difference, change.low, change.high, p_value, p_value
    )


def _with_family(policy: Policy, draft: RuleVerdict, adjusted: float) -> RuleVerdict:
    beyond = f" by more than {draft.rule.margin:g}" if draft.rule.margin else ""
    moved = f"change {draft.value:+.3f} [{draft.low:+.3f}, {draft.high:+.3f}]"
    found = f"{moved}, one-sided p = {_p_words(draft, adjusted)} over {draft.n} pairs"
    if adjusted < policy.alpha:
        return dataclasses.replace(
            draft, outcome="fail", p_adjusted=adjusted, needs=None, says=f"{draft.metric} got worse{beyond}: {found}."
        )
    if draft.needs is not None and draft.needs > draft.n:
        says = (
            f"{draft.metric}: no evidence that it got worse{beyond}, but {draft.n} pairs would not show a change of "
            f"{draft.rule.detect:g}; it takes {draft.needs} ({found})."
        )
        return dataclasses.replace(draft, outcome="not measurable", p_adjusted=adjusted, says=says)
    return dataclasses.replace(
        draft, p_adjusted=adjusted, needs=None, says=f"{draft.metric}: no evidence that it got worse{beyond} ({found})."
    )


def _p_words(draft: RuleVerdict, adjusted: float) -> str:
    raw = adjusted if draft.p_value is None else draft.p_value
    return f"{raw:.3g}" if raw == adjusted else f"{raw:.3g}, {adjusted:.3g} within the policy,"


def _non_inferiority(policy: Policy, rule: Rule, metric: Metric, change: Change) -> RuleVerdict:
    margin = float(rule.margin or 0.0)
    # The interval at two alpha: each end is a one-sided bound at alpha.
    scale = normal_quantile(1.0 - policy.alpha) / two_sided_z(0.95)
    sign = -1.0 if metric.higher_is_better else 1.0
    worsening = sign * change.difference
    ends = sorted((sign * change.low, sign * change.high))
    low, high = (worsening + scale * (end - worsening) for end in ends)
    found = f"worsening {worsening:+.3f} [{low:+.3f}, {high:+.3f}] over {change.n} pairs, margin {margin:g}"
    if high < margin:
        outcome: Outcome = "pass"
        says, needs = f"{change.metric} is not inferior: {found}.", None
    elif low > margin:
        outcome, says, needs = "fail", f"{change.metric} is inferior: {found}.", None
    else:
        outcome = "not measurable"
        room = max(margin - max(worsening, 0.0), 1e-9)
        needs = math.ceil(change.n * ((high - worsening) / room) ** 2) if worsening < margin else None
        more = f"; about {needs} pairs would decide" if needs else ""
        says = f"{change.metric}: neither shown to be within the margin nor beyond it: {found}{more}."
    return RuleVerdict(rule, change.metric, outcome, says, change.n, needs, change.difference, change.low, change.high)


def _threshold(policy: Policy, rule: Rule, metric: Metric, records: Sequence[Record]) -> RuleVerdict:
    estimate = metric.estimate(records)
    if estimate is None or estimate.n < rule.min_n:
        n = 0 if estimate is None else estimate.n
        says = f"{metric.name}: {n} items that it counts, the policy asks for {rule.min_n}."
        return RuleVerdict(rule, metric.name, "not measurable", says, n, rule.min_n)
    low, high = _bounds(policy, metric, estimate, records)
    ends = (("at least", rule.min), ("at most", rule.max))
    limits = " and ".join(f"{words} {end:g}" for words, end in ends if end is not None)
    found = f"{estimate.value:.3f}, one-sided bounds [{low:.3f}, {high:.3f}], {estimate.n} items, wanted {limits}"
    least, most = (-math.inf if rule.min is None else rule.min), (math.inf if rule.max is None else rule.max)
    outcome: Outcome = "pass"
    says, needs = f"{metric.name} is within its limits: {found}.", None
    if not least <= estimate.value <= most:
        outcome, says = "fail", f"{metric.name} is outside its limits: {found}."
    elif rule.margin is not None and not (least - rule.margin <= low and high <= most + rule.margin):
        room = min(most + rule.margin - estimate.value, estimate.value - (least - rule.margin))
        width = max(high - estimate.value, estimate.value - low)
        needs = math.ceil(estimate.n * (width / max(room, 1e-9)) ** 2)
        outcome = "not measurable"
        short = f"too few items to show it within {rule.margin:g} of its limits"
        says = f"{metric.name}: {short}: {found}; about {needs} would."
    return RuleVerdict(rule, metric.name, outcome, says, estimate.n, needs, estimate.value, low, high)


def _bounds(policy: Policy, metric: Metric, estimate: Estimate, records: Sequence[Record]) -> tuple[float, float]:
    """Return one-sided bounds at alpha: exact for a rate of single items, else scaled from the 95 % interval."""
    events = estimate.value * estimate.n
    if metric.is_binary and policy.alpha < 0.5 and abs(events - round(events)) < 1e-9:
        clusters, seconds = dependence(list(metric.rows(records).values()))
        if seconds is None and len(set(clusters)) == estimate.n:
            exact = clopper_pearson(round(events), estimate.n, confidence=1.0 - 2.0 * policy.alpha)
            return exact.low, exact.high
    scale = normal_quantile(1.0 - policy.alpha) / two_sided_z(0.95)
    return (
        estimate.value - scale * (estimate.value - estimate.low),
        estimate.value + scale * (estimate.high - estimate.value),
    )


def _p_beyond(change: Change, metric: Metric, margin: float) -> float:
    """Return the one-sided p-value of a worsening of no more than the margin (normal, by the interval's width)."""
    error = (change.high - change.low) / (2.0 * two_sided_z(0.95))
    worsening = -change.difference if metric.higher_is_better else change.difference
    if error <= 0.0:
        return 1.0 if worsening <= margin else 0.0
    return 0.5 * math.erfc((worsening - margin) / error / math.sqrt(2.0))


def _pairs_to_detect(policy: Policy, rule: Rule, change: Change) -> int | None:
    """Return the pairs that show a change of `detect` with the policy's power; None where the rule asks for none."""
    if rule.detect is None:
        return None
    # What is seen is the excess over the margin.
    excess = rule.detect - (rule.margin or 0.0)
    level = _level(policy)
    if change.unit != "rate":
        scale = _reach(level, policy.power) / _reach(ALPHA, POWER)
        return math.ceil(change.n * (scale * change.minimum_detectable_change / excess) ** 2)
    discordant = min(1.0, max((change.worse + change.better) / change.n, rule.detect))
    plain = _pairs(discordant, excess, level=level, power=policy.power)
    # Clustered pairs count for less: in the worst case a cluster for one, and unequal ones for less still.
    return math.ceil(plain * max(change.n / max(change.clusters, 1), change.design_effect or 1.0))


def _level(policy: Policy) -> float:
    """Return the level that the adjustment leaves to one rule when all others hold."""
    tested = sum(rule.test == "regression" for rule in policy.rules)
    return policy.alpha if policy.multiplicity == "none" else policy.alpha / max(1, tested)


def _pairs(discordant: float, change: float, *, level: float, power: float) -> int:
    """Return the pairs with which the exact one-sided test shows a change; the normal formula promises too few."""
    pairs = required_pairs(discordant, change, alpha=level, power=power, two_sided=False)
    while (
        pairs * discordant < _MOST_COUNTED
        and mcnemar_power(pairs, discordant, change, alpha=level, two_sided=False) < power
    ):
        pairs += max(1, pairs // 100)
    return pairs


def _reach(level: float, power: float) -> float:
    """Return how many standard errors a change must measure to be seen, one-sided."""
    return normal_quantile(1.0 - level) + normal_quantile(power)
