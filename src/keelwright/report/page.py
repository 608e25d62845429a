# SPDX-License-Identifier: Apache-2.0
"""Renders a run as one self-contained HTML page: no request leaves it, and it needs no script to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from keelwright.core.records import Record
from keelwright.report.answers import browse
from keelwright.report.areas import area_forest, change_forest
from keelwright.report.audit_reading import audit_key_figures, is_lower_better, primary_of, unit_of_metric
from keelwright.report.disagreement import judge_tables
from keelwright.report.examples import AUDIT_TITLES, CHANGE_TITLES, Example, pick_examples
from keelwright.report.figures import area_bars, safety_utility_curve
from keelwright.report.pairs import pairs_views
from keelwright.report.parts import metric_titles, overlaps_table, part_views, usage_table
from keelwright.report.reading import Reading, read_metrics, read_summary, unit_of_utility
from keelwright.report.rendering import render
from keelwright.report.rules import gate_badge, gate_facts, gate_sentence, rules_table
from keelwright.report.sections import audit_facts, badge, caution_words, evidence_words, facts, heal_key_figures
from keelwright.report.tables import (
    Table,
    changes_table,
    floor_words,
    limits_table,
    models_table,
    race_table,
    split_changes,
    trials_table,
)
from keelwright.report.validation import validation_views

_FULL_STYLE: Final = ("style.css", "audit.css")
_FULL_SCRIPT: Final = ("script.js", "answers.js")


def render_heal(run: Mapping[str, Any], summary: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Return the page of a `heal` or `demo` run.

    Args:
        run: `run.json`.
        summary: `summary.json`.
        records: `records.jsonl`; the examples are chosen from them.
    """
    reading = read_summary(summary)
    roles = [(role, reading.role_title(role)) for role in reading.roles]
    tests = summary.get("tests") or ()
    found, quiet = split_changes(tests, reading.primary)
    family = f"{len(tests)} comparisons, p also corrected by Holm within each pair of models"
    return render(
        "heal.html.j2",
        run,
        summary,
        title=f"{badge(reading).word}: {_names(run)}",
        reading=reading,
        badge=badge(reading),
        facts=facts(run, reading),
        key_figures=heal_key_figures(reading),
        models=models_table(reading.models, roles, summary),
        changes=changes_table(
            found, unit_of_utility=reading.utility_unit, caption=f"Paired tests on the verification half ({family})"
        ),
        quiet_changes=changes_table(
            quiet,
            unit_of_utility=reading.utility_unit,
            caption="Comparisons without evidence of a change",
            name="quiet-changes",
        ),
        evidence=evidence_words(reading),
        curve=safety_utility_curve(reading),
        areas=area_bars(summary.get("areas") or (), roles, reading.primary),
        examples=_examples(pick_examples(records, _model_ids(reading), primary=reading.primary), CHANGE_TITLES),
        role_titles=dict(roles),
        race=race_table(reading),
        trials=trials_table(reading),
        floors=floor_words(reading),
        best=reading.best_trade_off(),
        limits=limits_table(reading),
        cautions=caution_words(summary, has_halves=bool(reading.trials)),
    )


def render_audit(run: Mapping[str, Any], summary: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Return the page of an `audit` run: figures, areas and answers, beside those of a reference where there is one.

    Args:
        run: `run.json`.
        summary: `summary.json` of the audit.
        records: `records.jsonl`.
    """
    models = {"model": read_metrics(summary.get("metrics"))}
    roles = [("model", "Model")]
    if summary.get("against"):
        models["against"] = read_metrics(summary["against"].get("metrics"))
        roles.insert(0, ("against", "Reference"))
    primary = primary_of(summary)
    changes = [{**row, "from": "reference", "to": "model"} for row in summary.get("changes") or ()]
    model = str(summary.get("model") or _names(run))
    browser = browse(records, [(role, role) for role, _ in roles], primary=primary)
    ids = {"tuned": "model"} if len(roles) == 1 else {"aligned": "against", "tuned": "model"}
    chosen = () if browser and browser.turns else pick_examples(records, ids, primary=primary)
    caption = "Paired change from the reference to the model"
    return render(
        "audit.html.j2",
        run,
        summary,
        styles=_FULL_STYLE,
        scripts=_FULL_SCRIPT,
        title=f"Audit: {model}",
        sentence=str(summary.get("sentence") or f"What {model} answers and refuses."),
        facts=audit_facts(run, summary),
        key_figures=audit_key_figures(summary, models, roles, primary),
        models=models_table(models, roles, summary) if any(_is_measured(one) for one in models.values()) else None,
        changes=_changes(changes, summary, caption) if changes else None,
        primary=primary,
        areas=area_forest(
            summary.get("areas") or (), roles, primary, unit=unit_of_metric(summary, primary),
            lower_is_better=is_lower_better(summary, primary),
        ),
        area_changes=change_forest(summary.get("area_changes") or (), primary),
        parts=part_views(summary, roles),
        overlaps=overlaps_table(summary),
        usage=usage_table(summary, roles),
        pairs=pairs_views(records, roles, browser.links if browser else None),
        judges=judge_tables(records, roles, summary),
        validation=validation_views(summary),
        browser=browser,
        examples=_examples(chosen, AUDIT_TITLES),
        role_titles={**dict(roles), "aligned": "Reference", "tuned": "Model"},
        cautions=caution_words(summary),
    )  # fmt: skip


def render_compare(run: Mapping[str, Any], summary: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Return the page of a `compare`: paired changes with their tests, by metric and by hazard area.

    Args:
        run: `run.json`, empty where the comparison has no folder of its own.
        summary: What `compare` returned.
        records: Of both runs under the model ids `before` and `after`, for the answers that flipped; or none.
    """
    names = [str(one) for one in summary.get("runs") or ()]
    facts = list(zip(("Before", "After"), names, strict=False))
    primary = primary_of(summary)
    roles = [("before", "Before"), ("after", "After")]
    if summary.get("family"):
        facts.append(("Family", str(summary["family"])))
    if summary.get("allowed"):
        facts.append(("Allowed to differ", ", ".join(str(one) for one in summary["allowed"])))
    browser = browse(records, [(role, role) for role, _ in roles], primary=primary)
    return render(
        "compare.html.j2",
        {"command": "compare", **run},
        summary,
        styles=_FULL_STYLE,
        scripts=_FULL_SCRIPT,
        title="Comparison of two runs",
        sentence=str(summary.get("sentence") or "What changed between two measurements of the same items."),
        facts=facts,
        says=[str(one) for one in summary.get("says") or ()],
        changes=_changes(summary.get("changes") or (), summary, "Paired change, after minus before, on the same items"),
        primary=primary,
        area_changes=change_forest(summary.get("area_changes") or (), primary),
        pairs=pairs_views(records, roles, browser.links if browser else None),
        judges=judge_tables(records, roles, summary),
        browser=browser,
        role_titles=dict(roles),
        cautions=caution_words(summary, has_metrics=False),
    )


def render_gate(run: Mapping[str, Any], summary: Mapping[str, Any], records: Sequence[Record] = ()) -> str:
    """Return the page of a `gate`: one row per rule with its verdict, interval, p-value, count and what it needs.

    Args:
        run: `run.json`.
        summary: `summary.json` of the gate.
        records: Not shown: the runs that were gated have pages of their own.
    """
    shown = gate_badge(summary)
    return render(
        "gate.html.j2",
        {"command": "gate", **run},
        summary,
        styles=_FULL_STYLE,
        title=f"{shown.word}: {(summary.get('policy') or {}).get('name', 'policy')}",
        badge=shown,
        sentence=gate_sentence(summary),
        facts=gate_facts(summary),
        rules=rules_table(summary),
        cautions=caution_words(summary, has_metrics=False),
    )


def render_validate(run: Mapping[str, Any], summary: Mapping[str, Any], records: Sequence[Record] = ()) -> str:
    """Return the page of judges held against people's labels, without a model.

    Args:
        run: `run.json`.
        summary: `summary.json` of the validation.
        records: Not used: the answers are in the files of labels.
    """
    files = [str(one["ref"]) for one in (run.get("inputs") or {}).values() if one.get("ref")]
    return render(
        "validate.html.j2",
        {"command": "validate", **run},
        summary,
        styles=_FULL_STYLE,
        title="Judges against people's labels",
        sentence=str(summary.get("sentence") or "How far the judges agree with people."),
        facts=[("Labels", ", ".join(files)), ("Scale", str(summary.get("scale", "")))],
        validation=validation_views(summary),
        cautions=caution_words(summary, has_metrics=False),
    )


def _is_measured(metrics: Mapping[str, Any] | None) -> bool:
    return any(one is not None for one in (metrics or {}).values())


def _changes(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], caption: str) -> Table:
    return changes_table(
        rows,
        unit_of_utility=unit_of_utility(summary),
        caption=f"{caption}; p also corrected by Holm",
        titles=metric_titles(summary),
    )


def _examples(examples: Sequence[Example], titles: Mapping[str, str]) -> list[tuple[str, list[Example]]]:
    """Gather the examples under headings; stories that share a title share the heading."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(titles[example.story], []).append(example)
    return list(groups.items())


def _model_ids(reading: Reading) -> Mapping[str, str | None]:
    known: Mapping[str, str | None] = reading.summary.get("model_ids") or {}
    return {role: known.get(role) for role in ("aligned", "tuned", "repaired")}


def _names(run: Mapping[str, Any]) -> str:
    refs = [str(value["ref"]) for value in (run.get("inputs") or {}).values() if value.get("ref")]
    return refs[0] if len(refs) == 1 else " and ".join(refs[:2]) or "a model"
