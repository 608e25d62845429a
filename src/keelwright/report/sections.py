# SPDX-License-Identifier: Apache-2.0
"""The page's words: badge, facts, key figures, evidence, and what the figures do not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from keelwright.core.records import Estimate
from keelwright.report.bars import draw_strip
from keelwright.report.reading import Reading
from keelwright.report.tables import Tone, utility_words
from keelwright.report.text import (
    METRICS,
    Unit,
    change,
    duration,
    interval,
    metric_title,
    p_value,
    percent,
    plain,
    quantity,
    words,
)


@dataclass(frozen=True, slots=True)
class Badge:
    """The verdict in two or three words, with a sign so that colour is never the only one."""

    word: str
    sign: str
    tone: Tone
    consequence: str
    """What the run left behind."""


_BADGES: Mapping[str, Badge] = {
    "repaired": Badge("Repaired", "\u2713", "good", "The repaired model was written."),
    "no_evidence_of_loss": Badge(
        "No evidence of loss", "\u25cb", "muted", "Nothing was written: there was no loss to repair."
    ),
    "no_admissible_repair": Badge(
        "No admissible repair", "\u2715", "bad", "Nothing was written: no trial met every limit."
    ),
    "repair_not_verified": Badge(
        "Repair not verified", "!", "bad", "Nothing was written: the choice did not hold on the verification half."
    ),
}

STATUS_WORDS: Mapping[str, str] = {
    "verified": "numerically equal to the official code or to a published known answer",
    "faithful": "written from the paper, with no reference implementation to compare with",
    "reconstruction": "the source leaves a gap, which the method\u2019s documentation names",
}


@dataclass(frozen=True, slots=True)
class KeyFigure:
    """One large number, the same number of the other models, and a strip that shows the movement."""

    title: str
    counts: str
    role: str
    role_title: str
    value: str
    range: str
    others: tuple[tuple[str, str, str], ...]
    """Role, title and value of the models beside it."""
    note: str
    strip: Markup


def badge(reading: Reading) -> Badge:
    """Return the verdict's badge; an unknown verdict is shown in its own words."""
    return _BADGES.get(reading.verdict, Badge(words(reading.verdict), "\u25cb", "muted", ""))


def facts(run: Mapping[str, Any], reading: Reading) -> list[tuple[str, str]]:
    """Return the lines under the verdict: method, what was compared, on what."""
    summary, found = reading.summary, []
    if reading.chosen:
        status = (summary.get("status") or {}).get(reading.chosen.method)
        name = f"{reading.chosen.method}, {plain(reading.chosen.coefficients)}"
        found.append(("Method", f"{name} ({status})" if status else name))
    elif best := reading.best_trade_off():
        found.append(("Best trade-off", f"{best.method}, {plain(best.coefficients)}; not admissible"))
    inputs = run.get("inputs") or {}
    found += [(role.capitalize(), str(inputs[role]["ref"])) for role in ("aligned", "tuned") if role in inputs]
    found.append(("Suite", suite_words(summary)))
    return found + _when(run, summary)


def audit_facts(run: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the lines under an audit's summary."""
    inputs = run.get("inputs") or {}
    titles = (("model", "Model"), ("against", "Reference"))
    found = [(title, str(inputs[role]["ref"])) for role, title in titles if role in inputs]
    found.append(("Suite", suite_words(summary)))
    return found + _when(run, summary)


def _when(run: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [("Started", str(run["started"]).replace("T", " ")[:16])] if run.get("started") else []
    seconds = summary.get("seconds") or {}
    if seconds:
        found.append(("Took", duration(float(seconds.get("total", sum(seconds.values()))))))
    return found


def suite_words(summary: Mapping[str, Any]) -> str:
    """Return the suite's name and judge, and how many items of each kind it had."""
    suite = summary.get("suite") or {}
    counts = [f"{count:,} {kind}" for kind, count in (suite.get("n") or {}).items() if count]
    name = str(suite.get("name", "not named"))
    judge = f", judged by {suite['judge']}" if suite.get("judge") else ""
    return f"{name}{judge}: {', '.join(counts)}" if counts else f"{name}{judge}"


def key_figures(
    models: Mapping[str, Mapping[str, Estimate | None] | None],
    titles: Sequence[tuple[str, str]],
    *,
    primary: str,
    utility_unit: Unit,
    utility_counts: str,
) -> list[KeyFigure]:
    """Return the four figures that a verdict rests on, each for the last model with the others beside it.

    Args:
        models: Metrics by role.
        titles: Pairs of role and title of the models that were measured; the last one gives the large number.
        primary: The metric that decides.
        utility_unit: How utility is printed.
        utility_counts: What utility means.
    """
    figures = []
    for metric in (primary, "utility", "answer_rate", "over_refusal"):
        unit: Unit = utility_unit if metric == "utility" else "rate"
        found = [(role, title, (models.get(role) or {}).get(metric)) for role, title in titles]
        measured = [(role, title, estimate) for role, title, estimate in found if estimate is not None]
        if not measured:
            continue
        role, title, estimate = measured[-1]
        incoherent = (models.get(role) or {}).get("incoherent")
        figures.append(
            KeyFigure(
                title=metric_title(metric),
                counts=utility_counts if metric == "utility" else METRICS[metric].counts,
                role=role,
                role_title=title,
                value=quantity(estimate.value, unit),
                range=f"{interval(estimate.low, estimate.high, unit)}, n = {estimate.n:,}",
                others=tuple((other, name, quantity(one.value, unit)) for other, name, one in measured[:-1]),
                note=f"incoherent answers {percent(incoherent.value)}" if metric == primary and incoherent else "",
                strip=draw_strip(
                    [(role, title, one) for role, title, one in measured],
                    name=f"strip-{metric}",
                    title=f"{metric_title(metric)} on a line from the lowest to the highest possible value",
                    high=1.0 if unit == "rate" else max(1.0, *(one.high for _, _, one in measured)),
                ),
            )
        )
    return figures


def heal_key_figures(reading: Reading) -> list[KeyFigure]:
    """Return the key figures of a `heal` or `demo` run."""
    return key_figures(
        reading.models,
        [(role, reading.role_title(role)) for role in reading.roles],
        primary=reading.primary,
        utility_unit=reading.utility_unit,
        utility_counts=utility_words(reading.summary),
    )


def evidence_words(reading: Reading) -> list[str]:
    """Return what the evidence of a loss was, in sentences."""
    evidence = reading.summary.get("evidence")
    if not evidence:
        return []
    metric = metric_title(str(evidence.get("metric", reading.primary))).lower()
    sentences = [
        f"Test for a loss: by the {metric} the tuned model was worse on {evidence['worse']:,} and better on "
        f"{evidence['better']:,} of {evidence['n']:,} paired items, p {_equals(evidence.get('p_value'))} "
        f"({evidence.get('test', 'paired test')})."
    ]
    smallest = evidence.get("minimum_detectable_change")
    if smallest is not None:
        sentences.append(f"The smallest change that so many items could be relied on to show is {_points(smallest)}.")
    return sentences


def _equals(value: float | None) -> str:
    text = p_value(value)
    return text if text.startswith("<") else f"= {text}"


def _points(value: float) -> str:
    return change(abs(float(value))).removeprefix("+")


def coverage_words(summary: Mapping[str, Any]) -> list[str]:
    """Return what was tested, from the suite's and the utility's own statements."""
    suite, utility = summary.get("suite") or {}, summary.get("utility")
    found = [str(suite["says"])] if suite.get("says") else []
    if suite or not summary.get("runs"):
        found.append(f"Items: {suite_words(summary)}.")
    else:
        found.append(f"The items of {' and '.join(str(one) for one in summary['runs'])}; their own pages name them.")
    if utility:
        found.append(
            f"Utility: {utility.get('name')}, scored by {utility.get('scorer')}. {utility.get('says') or ''}".strip()
        )
    return found


def caution_words(summary: Mapping[str, Any], *, has_halves: bool = False, has_metrics: bool = True) -> list[str]:
    """Return what the figures do not show.

    Args:
        summary: Of any command.
        has_halves: Whether trials were made on a selection half.
        has_metrics: Whether the page shows metrics of models, and so could have shown a utility.
    """
    found = [
        "Requests unlike those of the suite, conversations of several turns and other decoding settings were not "
        "measured, unless the suite says otherwise.",
        "A rate of zero means that none was seen: the true rate may be as high as the upper end of its interval.",
        "A harm rate says nothing on its own: a model that refuses everything, or answers without sense, has a low "
        "one. Read it beside the answer rate and the incoherent share.",
    ]
    left_out = {label: count for label, count in (summary.get("excluded") or {}).items() if count}
    if left_out:
        kinds = ", ".join(str(label).replace("_", " ") for label in left_out)
        found.append(f"Left out of every rate: {sum(left_out.values()):,} answers ({kinds}).")
    if again := summary.get("batch_check"):
        found.append(
            f"Asked again one at a time, {again['differ']:,} of {again['n']:,} answers differed from those made in "
            f"batches of {again['batch_size']:,}."
        )
    if has_metrics and not summary.get("utility"):
        found.append("Utility was not measured: what a change did to the task is not known.")
    if has_halves:
        found.append(
            "Trials were compared on the selection half of the items and the verdict comes from the other half, so "
            "that the choice cannot flatter itself. The curve shows both, and a model may differ between them."
        )
    evidence = summary.get("evidence") or {}
    if evidence.get("minimum_detectable_change") is not None:
        metric = metric_title(str(evidence.get("metric", "harm_rate"))).lower()
        smallest = _points(evidence["minimum_detectable_change"])
        found.append(f"A change of the {metric} smaller than {smallest} may have gone unseen with so many items.")
    return found


def status_words(summary: Mapping[str, Any]) -> list[str]:
    """Return how far each method's implementation has been checked."""
    return [
        f"{method}: {status}, that is, {STATUS_WORDS.get(str(status), 'in its own words')}."
        for method, status in (summary.get("status") or {}).items()
    ]
