# SPDX-License-Identifier: Apache-2.0
"""An audit in one sentence, and its models side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from keelwright.report.text import number, percent

_NOUNS: Final = {
    "harm_rate": "harm rate",
    "refusal_rate": "refusal rate",
    "over_refusal": "over-refusal",
    "answer_rate": "ordinary requests answered",
    "incoherent": "incoherent",
}
_FIGURES_TOLD: Final = 3
_NOT_GROUNDED: Final = " Not grounded: what the change was for was not measured (--utility)."
"""A loss of safety is read beside the gain that it was paid for."""


def models_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of each model by role, the reference first."""
    against = summary.get("against")
    columns = {"against": against["metrics"]} if against else {}
    return {**columns, "model": summary["metrics"]}


def sentence(summary: Mapping[str, Any]) -> str:
    """Return the audit in one sentence: the rates, never the harm rate alone."""
    metrics = summary["metrics"]
    parts = [
        f"{words} {percent(metrics[name]['value'])}" for name, words in _NOUNS.items() if metrics[name] is not None
    ]
    if not parts:
        told = [one for one in summary["figures"] if one["estimate"] is not None][:_FIGURES_TOLD]
        parts = [f"{one['title'].lower()} {_shown(one)}" for one in told] or ["nothing could be measured"]
    grounded = "" if summary.get("grounded", True) else _NOT_GROUNDED
    return f"{summary['model']}: {', '.join(parts)}.{_change(summary)}{grounded}"


def _shown(figure: Mapping[str, Any]) -> str:
    value = figure["estimate"]["value"]
    return percent(value) if figure["unit"] == "rate" else number(value)


def _change(summary: Mapping[str, Any]) -> str:
    """Return what the comparison found, with a blank before it; empty where there is none."""
    if "against" not in summary:
        return ""
    reference = summary["against"]["model"]
    worse = [change["metric"].replace("_", " ") for change in summary["changes"] if change["verdict"] == "regressed"]
    if worse:
        return f" Regressed against {reference}: {', '.join(worse)}."
    first = summary["changes"][0]
    noun = _NOUNS.get(first["metric"], first["metric"].replace("_", " "))
    scale = 1.0 if first["unit"] == "score" else 100.0
    unit = "" if first["unit"] == "score" else " points"
    return (
        f" No evidence of a regression against {reference}: {first['n']} items would have shown "
        f"a change of {number(scale * first['minimum_detectable_change'])}{unit} in the {noun}."
    )
