# SPDX-License-Identifier: Apache-2.0
"""Renders a run of `stress`, `harden` or `tune` as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from keelwright.core.records import Estimate, Record
from keelwright.report.answers import browse
from keelwright.report.rendering import render
from keelwright.report.rules import gate_badge, gate_facts, gate_sentence, rules_table
from keelwright.report.sections import Badge, KeyFigure, audit_facts, caution_words, key_figures
from keelwright.report.step_curves import dose_curve, step_curves, training_curve
from keelwright.report.tables import utility_words
from keelwright.report.text import METRICS, plain
from keelwright.report.training_log import cost_table
from keelwright.report.tuning_reading import TuningReading, estimate_of, read_tuning
from keelwright.report.tuning_tables import (
    change_tables,
    claims_tables,
    knee_words,
    protocol_table,
    protocol_warning,
    results_tables,
    rises_words,
    style_tables,
)

_KINDS: Final[Mapping[str, str]] = {"stress": "Stress test", "harden": "Hardening", "tune": "Tuning"}
_MOST_KEYS: Final = 4
"""Models beside each other in a key figure."""


def render_tuning(run: Mapping[str, Any], summary: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Return the page of a run that trains and measures: verdict, figures over steps, every measurement, answers.

    Args:
        run: `run.json`.
        summary: `summary.json` of `stress`, `harden` or `tune`.
        records: `records.jsonl`; rows name theirs by `model_id`.
    """
    summary = _with_suite(summary)
    reading = read_tuning(summary)
    kind = _KINDS.get(str(summary.get("command")), "Tuning")
    gate = _gate(summary)
    shown, folded = results_tables(reading)
    changes, quiet = change_tables(reading)
    claims, early_claims = claims_tables(reading)
    browser = browse(records, _sides(reading), primary=reading.primary)
    return render(
        "tuning.html.j2",
        run,
        summary,
        styles=("style.css", "audit.css", "tuning.css"),
        scripts=("script.js", "answers.js"),
        title=f"{kind}: {summary.get('model') or 'a model'}",
        badge=gate_badge(gate) if gate else Badge(kind, "\u25cb", "muted", ""),
        sentence=str(summary.get("sentence") or gate_sentence(gate or {})),
        facts=_facts(run, reading, gate),
        notes=[str(one) for one in (protocol_warning(reading), *(summary.get("notes") or ())) if one],
        key_figures=_key_figures(reading),
        key_seed=reading.seeds[0] if len(reading.seeds) > 1 else None,
        key_stress=reading.stresses[0] if len(reading.stresses) > 1 else None,
        has_seeds=len(reading.seeds) > 1,
        reading=reading,
        steps=step_curves(reading),
        results=shown,
        all_results=folded,
        changes=changes,
        quiet_changes=quiet,
        claims=claims,
        early_claims=early_claims,
        doses=dose_curve(reading),
        knee_told=knee_words(reading),
        rises_told=rises_words(reading),
        style_effects=style_tables(reading),
        rules=rules_table(gate) if gate else None,
        training=training_curve(reading),
        protocol=protocol_table(reading),
        cost=cost_table(reading),
        browser=browser,
        role_titles={arm.role: arm.title for arm in reading.arms},
        primary=reading.primary,
        cautions=[*_cautions(reading), *caution_words(summary, has_metrics=not reading.is_measured("utility"))],
    )


def _with_suite(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary with what every page says of suite and utility, taken from the protocol where need be."""
    protocol: Mapping[str, Any] = summary.get("protocol") or {}
    found = dict(summary)
    if not found.get("suite") and protocol.get("suite"):
        counts = {"items": protocol["items"]} if protocol.get("items") else {}
        found["suite"] = {"name": protocol["suite"], "n": counts}
    return found


def _gate(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the gate's verdict as the page of a gate reads it; a policy may be a name alone."""
    gate = summary.get("gate")
    if not gate:
        return None
    policy = gate.get("policy")
    return {**gate, "policy": policy if isinstance(policy, Mapping) else {"name": policy}}


def _facts(run: Mapping[str, Any], reading: TuningReading, gate: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    summary = reading.summary
    found = [
        (title, str(summary[key])) for key, title in (("stress", "Stress"), ("defence", "Defence")) if summary.get(key)
    ]
    if not found and summary.get("method"):
        found.append(("Method", str(summary["method"])))
    tuned = [row for arm in reading.arms if arm.is_tuned and not arm.is_control for row in arm.rows]
    mixes = dict.fromkeys(
        (int(row["rows"]), int(row["harmful_rows"]))
        for row in tuned
        if row.get("rows") and row.get("harmful_rows") is not None and row.get("stage") != "hardening"
    )
    if mixes:
        found.append(("Tuned on", "; ".join(f"{rows:,} rows, {harmful:,} of them harmful" for rows, harmful in mixes)))
    rates = dict.fromkeys(float(row["lr"]) for row in tuned if row.get("lr") and row.get("stage") != "hardening")
    if rates:
        found.append(("Learning rate", ", ".join(plain(rate) for rate in rates)))
    if len(reading.seeds) > 1:
        found.append(("Training seeds", plain(reading.seeds)))
    if summary.get("model_out"):
        found.append(("Written to", str(summary["model_out"])))
    known = audit_facts(run, summary)
    if summary.get("model") and all(title != "Model" for title, _ in known):
        known.insert(0, ("Model", str(summary["model"])))
    policy = [one for one in gate_facts(gate) if one[0] in ("Policy", "Level")] if gate else []
    return [*known[:1], *found, *policy, *known[1:]]


def _key_figures(reading: TuningReading) -> list[KeyFigure]:
    """Return the figures that stand first: of the start and of each arm of the first stress, a defended one large."""
    starts = [arm for arm in reading.arms if arm.is_start]
    arms = [arm for arm in reading.arms_of(next(iter(reading.stresses), None)) if not arm.is_start]
    arms = sorted([arm for arm in arms if not arm.is_control] or arms, key=lambda arm: not arm.is_comparison)
    chosen = [*starts[:1], *(arms[:1] if len(arms) > 1 else []), *arms[1:][-(_MOST_KEYS - 2) :]]
    chosen = chosen if len(arms) > 1 else [*starts[:1], *arms]
    found = [(arm.role, arm.title, arm.last) for arm in chosen]
    models: dict[str, Mapping[str, Estimate | None]] = {
        role: {metric: estimate_of(row, metric) for metric in METRICS} for role, _, row in found
    }
    return key_figures(
        models,
        [(role, title) for role, title, _ in found],
        primary=reading.primary,
        utility_unit=reading.unit("utility"),
        utility_counts=utility_words(reading.summary) if reading.summary.get("utility") else METRICS["utility"].counts,
    )


def _sides(reading: TuningReading) -> list[tuple[str, str]]:
    """Return the models whose answers are shown: the start, and the last of each arm of the first stress."""
    found: dict[str, str] = {}
    arms = reading.arms_of(next(iter(reading.stresses), None))
    for arm in [*(arm for arm in reading.arms if arm.is_start), *(arm for arm in arms if not arm.is_control)]:
        if arm.last.get("model_id"):
            found.setdefault(str(arm.last["model_id"]), arm.role)
    return list(found.items())[:_MOST_KEYS]


def _cautions(reading: TuningReading) -> list[str]:
    """Return what a run of so many steps, rows and seeds does not show."""
    steps = [reading.step_of(row) for arm in reading.arms if arm.is_tuned for row in arm.rows]
    found = []
    if steps:
        found.append(
            f"The tuning ended after {max(steps):,g} steps. What holds until then may break with more steps, a higher "
            "learning rate or more harmful rows."
        )
    if len(reading.seeds) == 1:
        found.append("One training seed: how much another order of the rows would change is not known.")
    elif reading.seeds:
        found.append(
            f"{len(reading.seeds)} training seeds show a range, not an interval: with so few the mean is uncertain."
        )
    return found
