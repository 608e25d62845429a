# SPDX-License-Identifier: Apache-2.0
"""The page's tables as plain values; one template macro draws them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from keelwright.core.records import Estimate
from keelwright.report.reading import Reading, Trial, read_estimate, unit_of_utility
from keelwright.report.text import (
    METRICS,
    NOT_MEASURED,
    Unit,
    change,
    change_interval,
    interval,
    metric_title,
    number,
    p_value,
    plain,
    quantity,
    unit_of,
    words,
)

_ALPHA = 0.05
_NO_EVIDENCE = "no evidence of change"

Tone = Literal["", "good", "bad", "muted"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column's heading; numeric ones are set flush right with figures of equal width."""

    title: str
    is_numeric: bool = False
    role: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell: its text, a smaller second line, and what its colour would say (the text always says it too)."""

    text: str
    detail: str = ""
    tone: Tone = ""
    is_code: bool = False
    link: str = ""
    """Id of the element on this page that the text leads to."""


@dataclass(frozen=True, slots=True)
class Table:
    """A captioned table; the first cell of each row is its heading."""

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]


def estimate_cell(estimate: Estimate | None, unit: Unit = "rate") -> Cell:
    """Return a value with its interval and count below it."""
    if estimate is None:
        return Cell(NOT_MEASURED, tone="muted")
    detail = f"{interval(estimate.low, estimate.high, unit)}\nn = {estimate.n:,}"
    return Cell(quantity(estimate.value, unit), detail)


def models_table(
    models: Mapping[str, Mapping[str, Estimate | None] | None],
    roles: Sequence[tuple[str, str]],
    summary: Mapping[str, Any],
) -> Table:
    """Return models side by side, every metric with interval and count; `roles` are pairs of key and title."""
    rows = []
    for name, metric in METRICS.items():
        arrow = "lower is better" if metric.lower_is_better else "higher is better"
        counts = utility_words(summary) if name == "utility" else metric.counts
        unit = unit_of_utility(summary) if name == "utility" else "rate"
        cells = [estimate_cell((models.get(role) or {}).get(name), unit) for role, _ in roles]
        rows.append((Cell(metric.title, f"{counts}; {arrow}"), *cells))
    columns = (Column("Metric"), *(Column(title, True, role) for role, title in roles))
    return Table("models", "Each metric with its 95% interval and its count", columns, tuple(rows))


def utility_words(summary: Mapping[str, Any]) -> str:
    """Return what utility means in this run."""
    utility = summary.get("utility")
    return str(utility.get("says") or utility["name"]).rstrip(".") if utility else METRICS["utility"].counts


def split_changes(
    rows: Sequence[Mapping[str, Any]], primary: str
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return the comparisons to show at once, and those that may stay folded.

    The primary metric is always shown; of the others, those that found something.
    """
    shown = [row for row in rows if row["metric"] == primary or _outcome(row)[0] != _NO_EVIDENCE]
    return shown, [row for row in rows if row not in shown]


def changes_table(
    rows: Sequence[Mapping[str, Any]],
    *,
    unit_of_utility: Unit,
    caption: str,
    name: str = "changes",
    titles: Mapping[str, str] | None = None,
) -> Table:
    """Return paired changes with their tests.

    Args:
        rows: Mappings with `metric, difference, low, high, p_value, p_holm, n, test`, `from` and `to` roles, and in
            newer runs `unit, worse, better, clusters`.
        unit_of_utility: How the metric `utility` is printed.
        caption: The table's caption.
        name: Unique on the page.
        titles: Of metrics that are not among the headline six.
    """
    known = titles or {}
    columns = (
        Column("Change"),
        Column("Difference", True),
        Column("95% interval", True),
        Column("p", True),
        Column("p, Holm", True),
        Column("n", True),
        Column("Test"),
    )
    body = tuple(
        _change_row(
            row,
            unit_of_utility if row["metric"] == "utility" else unit_of(row.get("unit", "rate")),
            metric_title(str(row["metric"])) if row["metric"] in METRICS else known.get(str(row["metric"]), ""),
        )
        for row in rows
    )
    return Table(name, caption, columns, body)


def _change_row(row: Mapping[str, Any], unit: Unit, title: str) -> tuple[Cell, ...]:
    step = f"{row['from']} to {row['to']}" if row.get("from") and row.get("to") else "before to after"
    low, high, smallest = row.get("low"), row.get("high"), row.get("minimum_detectable_change")
    verdict, tone = _outcome(row)
    is_quiet = verdict == _NO_EVIDENCE or max(row.get("p_value") or 0.0, row.get("p_holm") or 0.0) >= _ALPHA
    unseen = unseen_words(smallest, unit) if is_quiet else ""
    return (
        Cell(title or metric_title(str(row["metric"])), step),
        Cell(change(float(row["difference"]), unit), verdict, tone),
        Cell(NOT_MEASURED if low is None or high is None else change_interval(low, high, unit)),
        Cell(p_value(row.get("p_value"))),
        Cell(p_value(row.get("p_holm"))),
        Cell(f"{row.get('n', 0):,}", pairs_words(row)),
        Cell(str(row.get("test") or ""), unseen),
    )


def unseen_words(smallest: float | None, unit: Unit) -> str:
    """Return the smallest change that so many pairs would have shown, for a test without a finding."""
    return "" if smallest is None else f"could have shown {change(float(smallest), unit).removeprefix('+')}"


def pairs_words(row: Mapping[str, Any]) -> str:
    """Return how many pairs of a change moved, and in how many groups they come; empty for runs that do not say."""
    moved = f"{row['worse']:,} worse\n{row['better']:,} better" if {"worse", "better"} <= row.keys() else ""
    groups, effect = row.get("clusters") or 0, row.get("design_effect")
    if not 0 < groups < row.get("n", 0):
        return moved
    return f"{moved}\nin {groups:,} groups" + (f"\ndesign effect {number(float(effect))}" if effect else "")


def _outcome(row: Mapping[str, Any]) -> tuple[str, Tone]:
    """Return the comparison's own verdict; without one, judge by the corrected p-value and the metric's direction."""
    verdict = row.get("verdict")
    known = METRICS.get(str(row["metric"]))
    if verdict is None and known is not None:
        adjusted = row.get("p_holm")
        if adjusted is None or adjusted >= _ALPHA:
            verdict = _NO_EVIDENCE
        else:
            verdict = "improved" if (row["difference"] < 0) == known.lower_is_better else "regressed"
    tones: Mapping[str, Tone] = {"improved": "good", "regressed": "bad"}
    return str(verdict or ""), tones.get(str(verdict), "")


def trials_table(reading: Reading) -> Table:
    """Return every trial with its selection-half metrics and the reason why it was or was not admissible."""
    metrics = [reading.primary, "utility", "answer_rate", "over_refusal", "incoherent"]
    columns = [Column("Trial")]
    columns += [Column(metric_title(name), True, note=_common_count(reading, name)) for name in metrics]
    columns += [Column("Change", True, note="of weights"), Column("Admissible")]
    rows = [
        (
            Cell(trial.name, _trial_notes(trial)),
            *(_short_cell(reading, trial, name) for name in metrics),
            Cell(number(trial.change)),
            _admissible_cell(trial),
        )
        for trial in reading.trials
    ]
    caption = "Every trial, measured on the selection half of the items"
    return Table("trials", caption, tuple(columns), tuple(rows))


def _trial_notes(trial: Trial) -> str:
    notes = [note for note, holds in (("chosen", trial.is_chosen), ("on the front", trial.is_on_front)) if holds]
    if not trial.is_whole:
        notes.append("first rounds only" if trial.items is None else f"first rounds only, {trial.items:,} items")
    if trial.dominated_by:
        notes.append(f"dominated by {trial.dominated_by}")
    return ", ".join(notes)


_ENDED: Mapping[str, tuple[str, Tone]] = {
    "chosen": ("chosen", "good"),
    "finalist": ("in the last round", ""),
    "left_behind": ("left behind", "muted"),
    "failed": ("failed", "bad"),
    "left_out": ("left out", "muted"),
}


def race_table(reading: Reading) -> Table | None:
    """Return what became of every method, or None where all of them were searched to the end."""
    rows = reading.summary.get("race") or ()
    if all(row["ended"] in ("chosen", "finalist") for row in rows):
        return None
    body = [_race_row(reading, row) for row in rows if row["ended"] != "left_out"]
    unable: dict[str, list[str]] = {}
    for row in rows:
        if row["ended"] == "left_out":
            unable.setdefault(str(row.get("text") or ""), []).append(str(row["method"]))
    rest = (Cell(""), *(Cell("") for _ in axes_of(reading)))
    for reason, names in unable.items():
        title = names[0] if len(names) == 1 else f"{len(names)} methods"
        body.append((Cell(title), Cell("left out", f"{', '.join(names)}: {reason}", "muted"), *rest))
    columns = (
        Column("Method"),
        Column("How far it came"),
        Column("Its best trial"),
        *(Column(metric_title(name), True) for name in axes_of(reading)),
    )
    return Table("race", "Every method, and how far it came", columns, tuple(body))


def _race_row(reading: Reading, row: Mapping[str, Any]) -> tuple[Cell, ...]:
    name, detail = str(row["method"]), str(row.get("text") or "")
    ended, tone = _ENDED.get(str(row["ended"]), (words(str(row["ended"])), ""))
    if row["ended"] == "left_behind":
        part = {"quarter": "a quarter", "half": "half"}.get(str(row["round"]), str(row["round"]))
        detail = f"after the round on {part} of the selection half" + (f"; {detail}" if detail else "")
    best = reading.trials[row["best"]] if row.get("best") is not None else None
    figures = [Cell("") if best is None else _counted_cell(reading, best, metric) for metric in axes_of(reading)]
    status = str((reading.summary.get("status") or {}).get(name, ""))
    return (Cell(name, status), Cell(ended, detail, tone), Cell(best.name if best else ""), *figures)


def _counted_cell(reading: Reading, trial: Trial, metric: str) -> Cell:
    """Return a value with the count that it rests on, which differs between rounds."""
    estimate = trial.metrics.get(metric)
    if estimate is None:
        return Cell(NOT_MEASURED, tone="muted")
    return Cell(quantity(estimate.value, reading.unit(metric)), f"n\u00a0=\u00a0{estimate.n:,}")


def _common_count(reading: Reading, metric: str) -> str:
    """Return the count for the column's heading where every trial has the same one, else nothing."""
    found = (trial.metrics.get(metric) for trial in reading.trials)
    counts = {estimate.n for estimate in found if estimate is not None}
    return f"n = {counts.pop():,}" if len(counts) == 1 else ""


def _short_cell(reading: Reading, trial: Trial, metric: str) -> Cell:
    estimate = trial.metrics.get(metric)
    if estimate is None:
        return Cell(NOT_MEASURED, tone="muted")
    count = "" if _common_count(reading, metric) else f"n = {estimate.n:,}"
    return Cell(quantity(estimate.value, reading.unit(metric)), count)


def _admissible_cell(trial: Trial) -> Cell:
    return Cell("yes", trial.reason, "good") if trial.is_admissible else Cell("no", trial.reason, "bad")


def limits_table(reading: Reading) -> Table:
    """Return each limit, the value that met or missed it, and on which half of the items."""
    rows = []
    for limit in reading.summary.get("limits") or ():
        name = str(limit["name"])
        unit = reading.unit(name)
        held = Cell("held", tone="good") if limit["held"] else Cell("failed", tone="bad")
        rows.append(
            (
                Cell(metric_title(name)),
                Cell(str(limit["half"])),
                Cell(_limit_value(limit.get("limit"), unit, name, is_limit=True)),
                Cell(_limit_value(limit.get("value"), unit, name)),
                held,
            )
        )
    columns = (Column("Limit"), Column("Half"), Column("Asked", True), Column("Found", True), Column("Outcome"))
    whose = "the chosen trial" if reading.chosen else "the trial that missed them least, on the selection half"
    return Table("limits-met", f"Limits on {whose}", columns, tuple(rows))


def _limit_value(value: Any, unit: Unit, name: str, *, is_limit: bool = False) -> str:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return NOT_MEASURED if value is None else plain(value)
    if name not in METRICS:
        return number(float(value))
    bound = ("at most " if METRICS[name].lower_is_better else "at least ") if is_limit else ""
    return bound + quantity(float(value), unit)


def points_table(reading: Reading) -> Table:
    """Return the data under the safety-utility curve: both axes of every point, with intervals."""
    rows = []
    for role in reading.roles:
        values = (estimate_cell(reading.estimate(role, name), reading.unit(name)) for name in axes_of(reading))
        rows.append((Cell(reading.role_title(role), "verification half"), *values, Cell("")))
    for trial in reading.whole_trials:
        values = (estimate_cell(trial.metrics.get(name), reading.unit(name)) for name in axes_of(reading))
        front = "yes" if trial.is_on_front else "no"
        rows.append((Cell(trial.name, "selection half"), *values, Cell(front)))
    columns = [Column("Point"), *(Column(metric_title(name), True) for name in axes_of(reading)), Column("On front")]
    return Table("curve-points", "Values behind the curve", tuple(columns), tuple(rows))


def axes_of(reading: Reading) -> tuple[str, ...]:
    """Return the metrics that the curve shows, horizontal first; without a utility only the primary metric."""
    return ("utility", reading.primary) if reading.has_utility else (reading.primary,)


def areas_table(
    areas: Sequence[Mapping[str, Any]], roles: Sequence[tuple[str, str]], metric: str, unit: Unit = "rate"
) -> Table:
    """Return the data under a figure of hazard areas; `roles` are pairs of key and title."""
    rows = tuple(
        (Cell(words(str(area["area"]))), *(estimate_cell(read_estimate(area.get(role)), unit) for role, _ in roles))
        for area in areas
    )
    columns = (Column("Area"), *(Column(title, True, role) for role, title in roles))
    return Table("area-values", f"{metric_title(metric)} by hazard area", columns, rows)


def pairs_table(
    name: str, caption: str, pairs: Sequence[tuple[str, Any]], titles: tuple[str, str], *, is_code: bool = True
) -> Table:
    """Return a two-column table of names and values, mappings flattened to `key.inner`."""
    rows = tuple((Cell(key, is_code=is_code), Cell(value, is_code=is_code)) for key, value in flatten(pairs))
    return Table(name, caption, (Column(titles[0]), Column(titles[1])), rows)


def flatten(pairs: Sequence[tuple[str, Any]], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested mappings as dotted names with plain values."""
    flat: list[tuple[str, str]] = []
    for key, value in pairs:
        if isinstance(value, Mapping) and value:
            flat.extend(flatten(list(value.items()), f"{prefix}{key}."))
        else:
            flat.append((f"{prefix}{key}", plain(value)))
    return flat


def floor_words(reading: Reading) -> str:
    """Return the limits in force, in one sentence, or nothing where the summary has none."""
    floors = reading.summary.get("floors") or {}
    parts = []
    if floors.get("utility_floor") is not None and reading.has_utility:
        parts.append(f"utility at least {plain(floors['utility_floor'])} of the tuned model\u2019s")
    if floors.get("slack") is not None:
        slack = plain(round(100 * float(floors["slack"]), 6))
        parts.append(
            f"answer rate, over-refusal and incoherent share within {slack} points of the aligned model\u2019s"
        )
    return "; ".join(parts)
