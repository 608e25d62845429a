# SPDX-License-Identifier: Apache-2.0
"""The model card of an output: where it comes from, under which licences, and what is known of its safety."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from keelwright.core.version import __version__

CardResults = Mapping[str, Mapping[str, Mapping[str, float] | None] | None]
"""Metrics by model, as in the JSON contract: `{"tuned": {"harm_rate": {"value", "low", "high", "n"} | None}}`."""

NOT_EVALUATED = "safety not evaluated"


@dataclass(frozen=True, slots=True)
class Provenance:
    """What an output's lock file and card say about how it was made."""

    method: str
    title: str = ""
    """The method in one line."""
    citation: str = ""
    status: str = ""
    coefficients: Mapping[str, float] = field(default_factory=dict)
    """What names the edit among those of its method."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Every setting of the method, defaults filled in."""
    folders: Mapping[str, Path] = field(default_factory=dict)
    """By role: the folder whose card names a licence. Models in memory have none."""
    results: CardResults | None = None
    """Safety figures, or None when nothing was measured."""
    seed: int | None = None
    """Seed of a method that draws random numbers."""


def model_card(
    provenance: Provenance,
    sources: Mapping[str, Mapping[str, str]],
    notes: tuple[str, ...] = (),
    *,
    library: str = "transformers",
) -> str:
    """Return the text of the output's `README.md`.

    Args:
        provenance: How it was made.
        sources: `{"model", "digest"}` by role.
        notes: Lines about tied tensors and the like.
        library: What loads the output: `transformers` or `peft`.
    """
    licences = {role: licence_of(folder) for role, folder in provenance.folders.items()}
    front: dict[str, Any] = {
        "base_model": [source["model"] for source in sources.values()],
        "library_name": library,
        "tags": ["keelwright", "merge", provenance.method],
    }
    known = {licence for licence in licences.values() if licence}
    if len(known) == 1 and all(licences.values()):
        front["license"] = next(iter(known))
    settings = ", ".join(f"{name} {value:g}" for name, value in provenance.coefficients.items()) or "none"
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", ""]
    lines += [f"# Repaired with {provenance.method}", ""]
    lines += [f"Method: {provenance.title or provenance.method}.", f"Coefficients: {settings}."]
    others = {name: value for name, value in provenance.settings.items() if name not in provenance.coefficients}
    if others:
        lines += [f"Other settings: {', '.join(f'{name} {_plain(value)}' for name, value in others.items())}."]
    if provenance.citation:
        lines += [f"Source of the method: {provenance.citation}."]
    if provenance.status:
        lines += [f"Status of this implementation: {provenance.status}."]
    lines += ["", "## Made from", "", "| role | model | digest | licence in its card |", "|---|---|---|---|"]
    for role, source in sources.items():
        licence = licences.get(role) or "not found"
        lines.append(f"| {role} | {source['model']} | `{source['digest']}` | {licence} |")
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    lines += ["", "## Safety", "", *_safety_lines(provenance.results), ""]
    lines += [f"Written by keelwright {__version__}; `merge.lock.json` holds every digest.", ""]
    return "\n".join(lines)


def licence_of(folder: Path) -> str | None:
    """Return the licence that the folder's own card states, or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---")
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    if not isinstance(front, dict):
        return None
    licence = front.get("license_name") or front.get("license")
    return str(licence) if licence else None


def _safety_lines(results: CardResults | None) -> list[str]:
    if not results:
        return [f"{NOT_EVALUATED}: nothing was measured before or after the edit."]
    models = [name for name, metrics in results.items() if metrics is not None]
    metrics = list(dict.fromkeys(metric for name in models for metric in results[name] or {}))
    lines = [f"| metric | {' | '.join(models)} |", f"|---|{'---|' * len(models)}"]
    for metric in metrics:
        cells = [_cell((results[name] or {}).get(metric)) for name in models]
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    lines += ["", "Each value with its 95 % interval and its count."]
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_plain(one) for one in value) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "not measured"
    return f"{estimate['value']:.3g} [{estimate['low']:.3g}, {estimate['high']:.3g}], n={estimate['n']:g}"
