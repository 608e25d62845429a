# SPDX-License-Identifier: Apache-2.0
"""What all pages share: templates that escape by default, the security policy, provenance and reproduction.

Everything a model or a user wrote is untrusted: templates escape it, and a content security policy allows only the
page's own style and script, by digest.
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

from keelwright.report.sections import coverage_words, status_words
from keelwright.report.tables import Cell, Column, Table, pairs_table
from keelwright.report.text import duration, memory, metric_title, words

_MACHINE_WORDS = {"cpus": "Processors"}


def render(
    template: str,
    run: Mapping[str, Any],
    summary: Mapping[str, Any],
    *,
    styles: Sequence[str] = ("style.css",),
    scripts: Sequence[str] = ("script.js",),
    **view: Any,
) -> str:
    """Return a whole page.

    Args:
        template: Its file.
        run: `run.json`.
        summary: `summary.json`.
        styles: Files that make up its style.
        scripts: Files that make up its script.
        view: What the template shows beside what all pages do.
    """
    style, script = _assets(*styles), _assets(*scripts)
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
def _assets(*names: str) -> Markup:
    """Return files of the package as they are: our own text, the only one that is not escaped."""
    folder = resources.files("keelwright.report").joinpath("templates")
    return Markup("\n").join(Markup(folder.joinpath(name).read_text(encoding="utf-8")) for name in names)


def _source_digest(text: str) -> str:
    """Return the digest by which a content security policy knows an inline block."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


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
