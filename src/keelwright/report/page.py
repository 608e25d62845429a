# SPDX-License-Identifier: Apache-2.0
"""Renders a run as one self-contained HTML page: no request leaves it, and it needs no script to be read.

Everything a model or a user wrote is untrusted: templates escape by default, and a content security policy allows
only this page's own style and script, by digest.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from keelwright.core.records import Record
from keelwright.report.examples import AUDIT_TITLES, CHANGE_TITLES, Example, pick_examples
from keelwright.report.figures import area_bars, safety_utility_curve
from keelwright.report.reading import Reading, read_metrics, read_summary, unit_of_utility
from keelwright.report.sections import (
    audit_facts,
    badge,
    caution_words,
    coverage_words,
    evidence_words,
    facts,
    heal_key_figures,
    key_figures,
    status_words,
)
from keelwright.report.tables import (
    Cell,
    Column,
    Table,
    changes_table,
    floor_words,
    limits_table,
    models_table,
    pairs_table,
    race_table,
    split_changes,
    trials_table,
    utility_words,
)
from keelwright.report.text import Unit, duration, memory, metric_title, words

_MACHINE_WORDS = {"cpus": "Processors"}


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
    return _render(
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
    """Return the page of an `audit` run: metrics, areas and answers, beside those of a reference where there is one.

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
    knows_harm = (models["model"] or {}).get("harm_rate") is not None
    primary = "harm_rate" if knows_harm else "refusal_rate"
    changes = [{**row, "from": "reference", "to": "model"} for row in summary.get("changes") or ()]
    unit = unit_of_utility(summary)
    model = str(summary.get("model") or _names(run))
    return _render(
        "audit.html.j2",
        run,
        summary,
        title=f"Audit: {model}",
        sentence=str(summary.get("sentence") or f"What {model} answers and refuses."),
        facts=audit_facts(run, summary),
        key_figures=key_figures(
            models, roles, primary=primary, utility_unit=unit, utility_counts=utility_words(summary)
        ),
        models=models_table(models, roles, summary),
        changes=_changes(changes, unit, "Paired change from the reference to the model") if changes else None,
        primary=primary,
        areas=area_bars(summary.get("areas") or (), roles, primary),
        examples=_examples(
            pick_examples(records, {"aligned": "against", "tuned": "model"}, primary=primary)
            if "against" in models
            else pick_examples(records, {"tuned": "model"}, primary=primary),
            AUDIT_TITLES,
        ),
        role_titles={"aligned": "Reference", "tuned": "Model"},
        cautions=caution_words(summary),
    )


def render_compare(run: Mapping[str, Any], summary: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Return the page of a `compare`: paired changes with their tests, each also in a sentence.

    Args:
        run: `run.json`, empty where the comparison has no folder of its own.
        summary: What `compare` returned.
        records: Of both runs, or none; only counted, since the two runs have pages of their own.
    """
    names = [str(one) for one in summary.get("runs") or ()]
    facts_ = list(zip(("Before", "After"), names, strict=False))
    if records:
        facts_.append(("Records", f"{len(records):,}"))
    caption = "Paired change, after minus before, on the same items"
    return _render(
        "compare.html.j2",
        {"command": "compare", **run},
        summary,
        title="Comparison of two runs",
        sentence=str(summary.get("sentence") or "What changed between two measurements of the same items."),
        facts=facts_,
        says=[str(one) for one in summary.get("says") or ()],
        changes=_changes(summary.get("changes") or (), unit_of_utility(summary), caption),
        cautions=caution_words(summary, has_metrics=False),
    )


def _render(template: str, run: Mapping[str, Any], summary: Mapping[str, Any], **view: Any) -> str:
    style, script = _asset("style.css"), _asset("script.js")
    return (
        _environment()
        .get_template(template)
        .render(
            style=style,
            script=script,
            style_digest=_source_digest(style),
            script_digest=_source_digest(script),
            run=run,
            summary=summary,
            command=str(run.get("command", "")),
            tested=coverage_words(summary),
            statuses=status_words(summary),
            warnings=[str(one) for one in summary.get("warnings") or ()],
            reproduce=_reproduce(run, summary),
            config=pairs_table(
                "config", "Resolved configuration", list((run.get("config") or {}).items()), ("Setting", "Value")
            ),
            provenance=_provenance(run, summary),
            **view,
        )
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("keelwright.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["metric_title"] = metric_title
    return environment


@functools.cache
def _asset(name: str) -> Markup:
    """Return a file of the package as it is: our own text, the only one that is not escaped."""
    return Markup(resources.files("keelwright.report").joinpath("templates", name).read_text(encoding="utf-8"))


def _source_digest(text: str) -> str:
    """Return the digest by which a content security policy knows an inline block."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _changes(rows: Sequence[Mapping[str, Any]], unit: Unit, caption: str) -> Table:
    return changes_table(rows, unit_of_utility=unit, caption=f"{caption}; p also corrected by Holm")


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


def _reproduce(run: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    if summary.get("reproduce"):
        return str(summary["reproduce"])
    argv = [str(one) for one in run.get("argv") or ()]
    return shlex.join(argv)


def _provenance(run: Mapping[str, Any], summary: Mapping[str, Any]) -> list[Table]:
    machine = dict(run.get("machine") or {})
    if "memory_bytes" in machine:
        machine["memory"] = memory(machine.pop("memory_bytes"))
    inputs = tuple(
        (
            Cell(words(role)),
            Cell(str(value.get("ref", "")), is_code=True),
            Cell(str(value.get("digest", "")), is_code=True),
        )
        for role, value in (run.get("inputs") or {}).items()
    )
    seconds = [(words(stage), duration(float(value))) for stage, value in (summary.get("seconds") or {}).items()]
    setting = [("Seed", run.get("seed")), ("Started", run.get("started"))]
    setting += [(_MACHINE_WORDS.get(key, words(str(key))), value) for key, value in machine.items()]
    tables = [
        Table("inputs", "Inputs and their digests", (Column("Input"), Column("Name"), Column("Digest")), inputs),
        pairs_table("versions", "Versions", list((run.get("versions") or {}).items()), ("Package", "Version")),
        pairs_table("machine", "Seed and machine", setting, ("What", "Value"), is_code=False),
        pairs_table("seconds", "Time by stage", seconds, ("Stage", "Wall time"), is_code=False),
    ]
    return [table for table in tables if table.rows]
