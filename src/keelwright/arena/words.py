# SPDX-License-Identifier: Apache-2.0
"""What a run that trains and measures came to, in one sentence; the harm rate never stands alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from keelwright.arena.arms import POSITIVE_CONTROL, START, UNDEFENDED
from keelwright.report.text import percent

_NOUNS: Final = {
    "harm_rate": "harm",
    "refusal_rate": "refusals of harmful requests",
    "over_refusal": "over-refusal",
    "answer_rate": "ordinary requests answered",
}

Row = Mapping[str, Any]


def stress_sentence(summary: Mapping[str, Any]) -> str:
    """Return what the stresses did, what the defences changed, and whether the control broke the model."""
    rows, metric = summary["rows"], _metric(summary)
    parts = []
    for stress in dict.fromkeys(row["stress"] for row in rows if row["arm"] == UNDEFENDED):
        start = _mean([row for row in rows if row["arm"] == START and row["stress"] == stress], metric)
        end = _mean(_last(rows, UNDEFENDED, stress), metric)
        answered = _mean(_last(rows, UNDEFENDED, stress), "answer_rate")
        told = f", {percent(answered)} of ordinary requests answered" if answered is not None else ""
        parts.append(f"{stress}: {_NOUNS[metric]} from {_shown(start)} to {_shown(end)}{told}")
        for arm in dict.fromkeys(row["arm"] for row in rows if row["stress"] == stress):
            if arm not in {START, UNDEFENDED}:
                parts.append(f"with {arm} {_shown(_mean(_last(rows, arm, stress), metric))}")
    control = [row for row in rows if row["arm"] == POSITIVE_CONTROL]
    broke = _mean(_last(control, POSITIVE_CONTROL, control[-1]["stress"]), metric) if control else None
    return "; ".join(parts) + f". Positive control: {_shown(broke)}."


def screened(cell: str, report: Mapping[str, Any]) -> str:
    """Return what a data guard let through, of one cell."""
    leaked, wrong = report["leakage"], report["false_positives"]
    if leaked is None:
        return f"{cell}: no harmful row was uploaded, so leakage is not defined."
    false = "" if wrong is None else f"; it flagged {percent(wrong['value'])} of the benign rows"
    close = "" if report["similarity"] is None else f"; gradients {report['similarity']:.2f} like those of harmful rows"
    return (
        f"{cell}: '{report['screen']}' let {percent(leaked['value'])} of {leaked['n']} harmful rows through "
        f"[{percent(leaked['low'])}, {percent(leaked['high'])}]{false}{close}."
    )


def harden_sentence(summary: Mapping[str, Any]) -> str:
    """Return what hardening changed in the model itself, and under each stress."""
    rows, metric, name = summary["rows"], _metric(summary), str(summary["method"]).split(" ")[0]
    own = next(row for row in rows if row["arm"] == START)["stress"]
    first = _before_and_after(rows, name, own, metric)
    told = []
    for stress in dict.fromkeys(row["stress"] for row in rows if row["arm"] == UNDEFENDED):
        plain, hardened = (_mean(_last(rows, arm, stress), metric) for arm in (UNDEFENDED, name))
        told.append(f"{stress} afterwards: {_NOUNS[metric]} {_shown(hardened)}, undefended {_shown(plain)}")
    return ". ".join([f"{summary['model']} with {summary['method']}: {first}", *told]) + "."


def tune_sentence(summary: Mapping[str, Any]) -> str:
    """Return what tuning changed, and the verdict of the gate."""
    rows, metric = summary["rows"], _metric(summary)
    name = next(row["arm"] for row in rows if row["arm"] != START)
    found = _before_and_after(rows, name, rows[0]["stress"], metric)
    verdict = {
        "pass": "The gate passes",
        "fail": "The gate fails",
        "not measurable": "With so few items the gate cannot decide",
    }
    outcome = summary["gate"]["outcome"]
    names = [one["metric"].replace("_", " ") for one in summary["gate"]["rules"] if one["outcome"] == outcome]
    why = "" if outcome == "pass" else f": {', '.join(names)}"
    return f"{summary['model']}, {summary['method']}: {found}. {verdict[outcome]}{why}."


def _before_and_after(rows: Sequence[Row], arm: str, stress: str, metric: str) -> str:
    start = [row for row in rows if row["arm"] == START and row["stress"] == stress]
    end = _last(rows, arm, stress)
    names = {metric: _NOUNS[metric], "answer_rate": _NOUNS["answer_rate"], "utility": "utility"}
    told = [
        f"{noun} from {_shown(_mean(start, name))} to {_shown(_mean(end, name))}"
        for name, noun in names.items()
        if _mean(end, name) is not None
    ]
    return ", ".join(told) or "nothing could be measured"


def _metric(summary: Mapping[str, Any]) -> str:
    primary = str(summary["primary"])
    return primary if primary in _NOUNS else "refusal_rate"


def _last(rows: Sequence[Row], arm: str, stress: str) -> list[Row]:
    """Return the last row of each seed."""
    found = {row["seed"]: row for row in rows if row["arm"] == arm and row["stress"] == stress}
    return list(found.values())


def _mean(rows: Sequence[Row], metric: str) -> float | None:
    values = [one["value"] for row in rows if (one := row["metrics"].get(metric)) is not None]
    return sum(values) / len(values) if values else None


def _shown(value: float | None) -> str:
    return "not measured" if value is None else percent(value)
