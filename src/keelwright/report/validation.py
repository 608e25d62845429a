# SPDX-License-Identifier: Apache-2.0
"""How far a judge can be trusted: its agreement with people by condition, and whether its scores mean what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from keelwright.core.records import Estimate
from keelwright.report.axes import Scale
from keelwright.report.figures import NARROW, Figure, Panel
from keelwright.report.reading import read_estimate
from keelwright.report.svg import element, group, label, line, marker, picture
from keelwright.report.tables import Cell, Column, Table, estimate_cell
from keelwright.report.text import NOT_MEASURED, interval, metric_title, number, p_value, percent

_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SCALES = {
    "refusal": "any refusal counts as positive",
    "harm": "any harm counts as positive",
    "score": "a score of 5 counts as positive",
}


@dataclass(frozen=True, slots=True)
class ValidationView:
    """One judge against people."""

    judge: str
    says: tuple[str, ...]
    is_biased: bool
    agreement: Table
    shifts: Table | None
    reliability: Figure | None


def validation_views(summary: Mapping[str, Any]) -> list[ValidationView]:
    """Return the judges of a run that were held against people's labels; none for runs without a validation."""
    found = summary.get("validation") or ()
    rows = [found] if isinstance(found, Mapping) else found
    return [_view(one, place) for place, one in enumerate(rows)]


def _view(found: Mapping[str, Any], place: int) -> ValidationView:
    conditions = found.get("conditions") or ()
    says = [f"Labels of people are the truth here; {_SCALES.get(str(found.get('scale')), 'as the labels say')}."]
    error = found.get("calibration_error")
    if error is not None:
        says.append(f"Expected calibration error of its scores: {number(float(error))}.")
    says += [str(one) for one in found.get("warnings") or ()]
    return ValidationView(
        judge=str(found.get("judge", "not named")),
        says=tuple(says),
        is_biased=bool(found.get("is_biased")),
        agreement=_agreement_table(conditions, place, found.get("metric")),
        shifts=_shifts_table(found.get("shifts") or (), place),
        reliability=_reliability(found.get("reliability") or (), place),
    )


def _agreement_table(conditions: Sequence[Mapping[str, Any]], place: int, metric: str | None) -> Table:
    is_corrected = any(one.get("corrected") or one.get("not_corrected") for one in conditions)
    columns = [
        Column("Condition"),
        Column("Labels", True),
        Column("Kappa", True),
        Column("Sensitivity", True),
        Column("Specificity", True),
        Column("Right, missed, false, left", True, note="of people\u2019s positives and negatives"),
    ]
    if is_corrected:
        title = f"{metric_title(metric)}, corrected" if metric else "Corrected rate"
        columns.append(Column(title, True, note="Rogan and Gladen"))
    rows = tuple(_agreement_row(one)[: len(columns)] for one in conditions)
    caption = "Agreement with people, by condition, each with its 95% interval"
    return Table(f"validation-{place}", caption, tuple(columns), rows)


def _agreement_row(one: Mapping[str, Any]) -> tuple[Cell, ...]:
    counts = one.get("counts") or {}
    four = ", ".join(f"{counts.get(name, 0):,}" for name in ("tp", "fn", "fp", "tn"))
    unread = f"{one['excluded']:,} not readable" if one.get("excluded") else ""
    corrected = read_estimate(one.get("corrected"))
    weighted = read_estimate(one.get("kappa_weighted"))
    agreed = estimate_cell(read_estimate(one.get("kappa")), "number")
    if weighted is not None:
        agreed = Cell(agreed.text, f"{agreed.detail}\nweighted {number(weighted.value)}", agreed.tone)
    return (
        Cell(str(one["condition"])),
        Cell(f"{one['n']:,}", unread),
        agreed,
        estimate_cell(read_estimate(one.get("sensitivity"))),
        estimate_cell(read_estimate(one.get("specificity"))),
        Cell(four),
        Cell(NOT_MEASURED, str(one.get("not_corrected") or ""), "muted")
        if corrected is None
        else estimate_cell(corrected),
    )


def _shifts_table(shifts: Sequence[Mapping[str, Any]], place: int) -> Table | None:
    rows = tuple(
        (
            Cell(" and ".join(str(name) for name in one["conditions"])),
            Cell(p_value(one.get("sensitivity_p"))),
            Cell(p_value(one.get("specificity_p"))),
            Cell("biased", "do not read paired changes by this judge", "bad")
            if one.get("biased")
            else Cell("no evidence of bias"),
        )
        for one in shifts
    )
    columns = (
        Column("Conditions"),
        Column("p, sensitivity", True),
        Column("p, specificity", True),
        Column("Paired comparison"),
    )
    caption = "Does the judge err differently between conditions? Fisher's exact test"
    return Table(f"shifts-{place}", caption, columns, rows) if rows else None


def _reliability(bins: Sequence[Mapping[str, Any]], place: int) -> Figure | None:
    read = [(float(one["mean_score"]), read_estimate(one["share"]), one) for one in bins]
    found = [(score, share, one) for score, share, one in read if share is not None]
    if not found:
        return None
    points = [(score, share) for score, share, _ in found]
    rows = tuple(
        (
            Cell(f"{number(float(one['low']))} to {number(float(one['high']))}"),
            Cell(number(score)),
            estimate_cell(share),
            Cell(
                "yes" if share.low <= score <= share.high else "no",
                tone="" if share.low <= score <= share.high else "bad",
            ),
        )
        for score, share, one in found
    )
    columns = (
        Column("Scores"),
        Column("Mean score", True),
        Column("Positive by people", True),
        Column("Score within the interval"),
    )
    table = Table(f"reliability-{place}-values", "Values behind the diagram", columns, rows)
    wide, narrow = (
        draw_reliability(points, name=f"reliability-{place}-{size}", width=width)
        for size, width in (("wide", 460.0), ("narrow", NARROW))
    )
    return Figure(f"reliability-{place}", (Panel("", wide, narrow),), (), table)


def draw_reliability(points: Sequence[tuple[float, Estimate]], *, name: str, width: float) -> Markup:
    """Return the reliability diagram: mean score against the share that people call positive, with its interval.

    Args:
        points: Mean score and share of each bin.
        name: Id of the element, unique on the page.
        width: In user units; the plot is square.
    """
    side = width - 70.0
    across, up = Scale(0.0, 1.0, 52.0, 52.0 + side), Scale(0.0, 1.0, 24.0 + side, 24.0)
    body: list[Markup] = []
    for tick in _TICKS:
        body += [
            line(across(tick), up(0), across(tick), up(1), "grid"),
            line(across(0), up(tick), across(1), up(tick), "grid"),
            label(across(tick), up(0) + 17, f"{tick:g}", "tick", "middle"),
            label(across(0) - 8, up(tick) + 4, f"{100 * tick:g}%", "tick", "end"),
        ]
    body.append(element("path", d=f"M{across(0):.1f} {up(0):.1f}L{across(1):.1f} {up(1):.1f}", class_="diagonal"))
    body += [_bin(score, share, across, up) for score, share in points]
    body.append(label(across(1), up(0) + 40, "Mean score of the judge \u2192", "axis-title", "end"))
    body.append(label(4, 14, "\u2191 Positive by people", "axis-title"))
    fits = sum(share.low <= score <= share.high for score, share in points)
    description = f"{len(points)} bins; in {fits} the mean score lies within the interval of the share. " + " ".join(
        f"Score {number(score)}: {percent(share.value)} of {share.n:,}." for score, share in points
    )
    return picture(name, "Reliability of the judge's scores", description, width, up(0) + 48, body)


def _bin(score: float, share: Estimate, across: Scale, up: Scale) -> Markup:
    x = across(score)
    tip = f"Mean score {number(score)}: {percent(share.value)} ({interval(share.low, share.high)}, n = {share.n:,})"
    return group(
        [
            element("title", tip),
            line(x, up(share.low), x, up(share.high), "span"),
            line(x - 4, up(share.low), x + 4, up(share.low), "span"),
            line(x - 4, up(share.high), x + 4, up(share.high), "span"),
            marker("circle", x, up(share.value), 5, "mark"),
        ],
        class_="point bin",
    )
