# SPDX-License-Identifier: Apache-2.0
"""A gate's verdict on the page: the badge, one row per rule, and what the policy asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from keelwright.report.sections import Badge
from keelwright.report.tables import Cell, Column, Table, Tone
from keelwright.report.text import NOT_MEASURED, change, interval, metric_title, number, p_value, words

_BADGES: Final[Mapping[str, Badge]] = {
    "pass": Badge("Pass", "\u2713", "good", "Every rule of the policy holds."),
    "fail": Badge("Fail", "\u2715", "bad", "At least one rule of the policy does not hold."),
    "not measurable": Badge(
        "Not measurable", "!", "bad", "No rule failed, but at least one could not be decided with so many items."
    ),
}
_TONES: Final[Mapping[str, Tone]] = {"pass": "good", "fail": "bad", "not measurable": "muted"}


def gate_badge(summary: Mapping[str, Any]) -> Badge:
    """Return the badge of a gate's outcome."""
    outcome = str(summary["outcome"])
    return _BADGES.get(outcome, Badge(words(outcome), "\u25cb", "muted", ""))


def gate_sentence(summary: Mapping[str, Any]) -> str:
    """Return the outcome in one sentence; each rule's own words stand in the table."""
    rules, name = summary.get("rules") or (), (summary.get("policy") or {}).get("name", "policy")
    held = sum(one["outcome"] == "pass" for one in rules)
    parts = [f"{held} of {len(rules)} rules of the policy \u2018{name}\u2019 hold"]
    for outcome, said in (("fail", "failed"), ("not measurable", "not measurable")):
        metrics = dict.fromkeys(metric_title(str(one["metric"])).lower() for one in rules if one["outcome"] == outcome)
        parts += [f"{said}: {', '.join(metrics)}"] if metrics else []
    return f"{'; '.join(parts)}."


def gate_facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the policy and the runs that it was held against."""
    policy, runs = summary.get("policy") or {}, [str(one) for one in summary.get("runs") or ()]
    found = [("Policy", str(policy.get("name", "not named")))]
    if policy.get("alpha") is not None:
        found.append(("Level", f"{policy['alpha']:g}, one-sided, with power {policy.get('power', 0):g}"))
    found += list(zip(("Before", "After") if len(runs) == 2 else ("Run",), runs, strict=False))
    return [*found, ("Family", str(summary["family"]))] if summary.get("family") else found


def rules_table(summary: Mapping[str, Any]) -> Table:
    """Return one row per rule: verdict, value or change with its interval, p-value, count, and what is needed."""
    columns = (
        Column("Rule"),
        Column("Verdict"),
        Column("Found", True),
        Column("Interval", True),
        Column("p, adjusted", True, note="one-sided"),
        Column("n", True),
        Column("Needs", True),
    )
    rows = tuple(_rule_row(one) for one in summary.get("rules") or ())
    return Table("rules", "Every rule of the policy, in the metric's own unit: a rate runs from 0 to 1", columns, rows)


def _rule_row(one: Mapping[str, Any]) -> tuple[Cell, ...]:
    rule, outcome = one["rule"], str(one["outcome"])
    is_value = rule["test"] == "threshold"
    found, low, high = one.get("value"), one.get("low"), one.get("high")
    ends = NOT_MEASURED
    if low is not None and high is not None:
        ends = interval(float(low), float(high), "number")
    shown = NOT_MEASURED
    if found is not None:
        shown = number(float(found)) if is_value else change(float(found), "number")
    sign = {"pass": "\u2713", "fail": "\u2715", "not measurable": "!"}.get(outcome, "")
    return (
        Cell(metric_title(str(one["metric"])), _asked(rule)),
        Cell(f"{sign} {outcome}", str(one.get("says") or ""), _TONES.get(outcome, "")),
        Cell(shown, "" if is_value or found is None else "change"),
        Cell(ends),
        Cell("" if one.get("p_adjusted") is None else p_value(one["p_adjusted"])),
        Cell(f"{one.get('n', 0):,}"),
        Cell("" if one.get("needs") is None else f"{one['needs']:,}"),
    )


def _asked(rule: Mapping[str, Any]) -> str:
    """Return what a rule asks for, in short."""
    parts = [str(rule["test"])]
    limits = (("margin", "margin"), ("detect", "must show"), ("min", "at least"), ("max", "at most"))
    parts += [f"{said} {rule[name]:g}" for name, said in limits if rule.get(name) is not None]
    if (rule.get("min_n") or 1) > 1:
        parts.append(f"{rule['min_n']:,} items at least")
    if rule.get("hazard"):
        parts.append(f"only {str(rule['hazard']).replace('_', ' ')}")
    return ", ".join(parts)
