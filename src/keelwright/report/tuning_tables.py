# SPDX-License-Identifier: Apache-2.0
"""The tables of a run that trains and measures: measurements, changes, seeds, doses, styles, protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from keelwright.report.reading import read_estimate
from keelwright.report.tables import Cell, Column, Table, changes_table, estimate_cell, pairs_table, split_changes
from keelwright.report.text import (
    METRICS,
    NOT_MEASURED,
    change,
    change_interval,
    metric_title,
    number,
    p_value,
    plain,
    quantity,
)
from keelwright.report.tuning_reading import Arm, Row, TuningReading, estimate_of, shown_metrics, stress_of

_MOST_SHOWN: Final = 12
"""Measurements above which those between begin and end are folded."""
_PROTOCOL: Final = (
    ("hash", "Digest of the protocol"),
    ("suite", "Suite"),
    ("items", "Items"),
    ("suite_digest", "Items, digest"),
    ("judge", "Judges, digest"),
    ("template", "Chat template, digest"),
    ("asking", "Frame around requests"),
    ("decoding", "Decoding, digest"),
    ("utility", "Utility"),
)


def results_tables(reading: TuningReading) -> tuple[Table | None, Table | None]:
    """Return the table of measurements to show at once, and that of all, where some were folded."""
    every = [(arm, row) for arm in reading.arms for row in arm.rows]
    if not every:
        return None, None
    caption = "Every model that was measured, each metric with its 95% interval and count"
    if len(every) <= _MOST_SHOWN:
        return _results(reading, every, "results", caption), None
    ends = [(arm, row) for arm, row in every if _is_end(arm, row)]
    first = _results(reading, ends, "results", "The last measurement of every arm and seed")
    return first, _results(reading, every, "all-results", caption)


def _is_end(arm: Arm, row: Row) -> bool:
    own = [one for one in arm.rows if one.get("seed") == row.get("seed")]
    return row is own[-1]


def _results(reading: TuningReading, rows: Sequence[tuple[Arm, Row]], name: str, caption: str) -> Table:
    metrics = shown_metrics(reading)
    columns = (
        Column("Model"),
        *(Column(metric_title(metric), True, note=_better(metric)) for metric in metrics),
    )
    body = tuple(
        (
            Cell(arm.name, _where(row, has_seeds=len(reading.seeds) > 1)),
            *(estimate_cell(estimate_of(row, metric), reading.unit(metric)) for metric in metrics),
        )
        for arm, row in rows
    )
    return Table(name, caption, columns, body)


def _better(metric: str) -> str:
    return "lower is better" if METRICS[metric].lower_is_better else "higher is better"


def _where(row: Row, *, has_seeds: bool) -> str:
    """Return what was done to the model of a row, up to this measurement."""
    stage, step = str(row.get("stage")), int(row.get("step") or 0)
    done = "before any training" if stage == "start" and not step else f"{stage}, step {step:,}"
    lines = [f"{done}; seed {row.get('seed')}" if has_seeds else done]
    harmful, count = row.get("harmful_rows"), row.get("rows")
    # A defence may read harmful rows without learning their answers: its mix is no share of poison.
    if count and stage != "hardening":
        lines.append(f"{harmful:,} of {count:,} rows harmful" if harmful is not None else f"{count:,} rows")
    if row.get("lr"):
        lines.append(f"learning rate {plain(float(row['lr']))}")
    return "\n".join(lines)


def change_tables(reading: TuningReading) -> tuple[Table, Table]:
    """Return the paired changes that found something or are of the primary metric, and the others."""
    given = reading.summary.get("changes") or ()
    several = len({row.get("stress") for row in given}) > 1
    rows = [_named(row, has_stresses=several, has_seeds=len(reading.seeds) > 1) for row in given]
    found, quiet = split_changes(rows, reading.primary)
    unit = reading.unit("utility")
    pairs = {tuple(row.get(key) for key in ("stress", "seed", "from", "to", "arm", "step")) for row in given}
    within = " within each pair of models" if len(pairs) > 1 else ""
    caption = f"Paired tests on the same items ({len(rows)} comparisons); p also corrected by Holm{within}"
    return (
        changes_table(found, unit_of_utility=unit, caption=caption),
        changes_table(
            quiet, unit_of_utility=unit, caption="Comparisons without evidence of a change", name="quiet-changes"
        ),
    )


def _named(row: Row, *, has_stresses: bool, has_seeds: bool) -> dict[str, Any]:
    """Return a change whose sides say what they are: arm, step, and where there are several, stress and seed."""
    sides = {side: str(row[side]) for side in ("from", "to") if row.get(side)}
    if "to" in sides:
        more = [f"step {int(row['step']):,}"] if row.get("step") else []
        more += [str(row["stress"])] if has_stresses and row.get("stress") not in (None, "none") else []
        more += [f"seed {row['seed']}"] if has_seeds and row.get("seed") is not None else []
        if row.get("arm") and str(row["arm"]).lower() not in sides["to"].lower():
            sides["to"] = f"{sides['to']} ({row['arm']})"
        sides["to"] = ", ".join([sides["to"], *more])
    return {**row, **sides}


def claims_tables(reading: TuningReading) -> tuple[Table | None, Table | None]:
    """Return how arms differ over training seeds at their last steps, and at the steps before; None without rows."""
    claims = reading.summary.get("claims") or ()
    ends: dict[tuple[Any, Any], float] = {}
    for row in claims:
        key = (row["stress"], row["arm"])
        ends[key] = max(ends.get(key, 0.0), reading.step_of(row))
    last = [row for row in claims if reading.step_of(row) == ends[row["stress"], row["arm"]]]
    before = [row for row in claims if row not in last]
    several = len({row["stress"] for row in claims}) > 1
    return (
        _claims(reading, last, "claims", "Over training seeds, at the last step of each arm", has_stresses=several),
        _claims(reading, before, "early-claims", "Over training seeds, at the steps before", has_stresses=several),
    )


def _claims(
    reading: TuningReading, rows: Sequence[Row], name: str, caption: str, *, has_stresses: bool
) -> Table | None:
    if not rows:
        return None
    columns = (
        Column("Difference over seeds"),
        Column("Mean", True),
        Column("95% interval", True, note="Student\u2019s"),
        Column("p", True, note="not corrected"),
        Column("Seeds", True),
        Column("Test"),
    )
    return Table(name, caption, columns, tuple(_claim_row(row, reading, has_stresses=has_stresses) for row in rows))


def _claim_row(row: Row, reading: TuningReading, *, has_stresses: bool) -> tuple[Cell, ...]:
    metric = str(row["metric"])
    unit = reading.unit(metric)
    told = f"{row['against']} to {row['arm']}, step {int(row['step']):,}"
    told += f", {row['stress']}" if has_stresses else ""
    low, high = float(row["low"]), float(row["high"])
    return (
        Cell(metric_title(metric), told),
        Cell(change(float(row["difference"]), unit)),
        Cell(change_interval(low, high, unit), "every seed the same" if low == high else ""),
        Cell(p_value(row.get("p_value"))),
        Cell(str(row["seeds"])),
        Cell(str(row.get("test") or "")),
    )


def harm_title(reading: TuningReading) -> str:
    """Return what doses and styles count as harm: where no judge knows harm, harmful requests that were not refused."""
    return "Not refused" if reading.primary == "refusal_rate" else metric_title("harm_rate")


def knee_point(reading: TuningReading) -> Row | None:
    """Return the dose at the knee of a sweep, or None without one."""
    found = reading.summary.get("knee") or {}
    return next((point for point in found.get("points") or () if point["k"] == found.get("k")), None)


def knee_table(reading: TuningReading) -> Table:
    """Return every dose of a sweep with its rates, the knee and the doses with more harm than the one before named."""
    found = reading.summary["knee"]
    columns = (
        Column("k"),
        Column(harm_title(reading), True, note="lower is better"),
        Column("Over-refusal", True, note="lower is better"),
        Column("Accuracy", True, note="of the task; higher is better"),
    )
    rises = found.get("rises") or ()
    rows = []
    for point in found["points"]:
        told = ["the knee"] if point["k"] == found["k"] else []
        told += ["more harm than at the dose before"] if point["k"] in rises else []
        rates = (estimate_cell(read_estimate(point.get(name))) for name in ("harm", "over_refusal", "accuracy"))
        rows.append((Cell(f"{point['k']:,}", "\n".join(told)), *rates))
    return Table("knee-values", "Every dose, with 95% intervals and counts over all seeds", columns, tuple(rows))


def knee_words(reading: TuningReading) -> str:
    """Return the knee in one line: the dose, its rates, and what it was held against; empty without one."""
    point = knee_point(reading)
    if point is None:
        return ""
    found = reading.summary["knee"]
    harm = harm_title(reading).lower()
    rates = [(harm, "harm"), ("over-refusal", "over_refusal"), ("accuracy", "accuracy")]
    parts = [f"{title} {_with_interval(point[name])}" for title, name in rates if point.get(name)]
    largest = max(found["points"], key=lambda one: one["k"])
    limit = f"within {plain(round(100 * float(found.get('within') or 0.0), 6))} points of"
    held = "the largest dose" if largest is point else f"{limit} {quantity(largest['harm']['value'], 'rate')} at k = "
    return f"k = {point['k']:,} ({held}{'' if largest is point else format(largest['k'], ',')}): {', '.join(parts)}"


def rises_words(reading: TuningReading) -> str:
    """Return a warning that names the doses with more harm than the one before, or nothing where harm only falls."""
    rises = (reading.summary.get("knee") or {}).get("rises") or ()
    if not rises:
        return ""
    named = ", ".join(f"{k:,}" for k in rises)
    return f"Harm rises at k = {named}: noise, or a sweep without a knee. Read the intervals before trusting the knee."


def _with_interval(values: Any) -> str:
    one = read_estimate(values)
    return NOT_MEASURED if one is None else f"{quantity(one.value, 'rate')} [{_ends(one.low, one.high)}]"


def style_tables(reading: TuningReading) -> list[tuple[str, Table, Table | None]]:
    """Return for each stress with a style: what it means, the 2 x 2 table of the first seed, and the others."""
    found = []
    for place, (stress, rows) in enumerate(_styles(reading).items(), 1):
        first, further = rows[:1], rows[1:]
        caption = f"{harm_title(reading)} with {stress}, trained and asked in the style or plainly"
        more = _style_table(f"{caption}, further seeds", f"styles-{place}-further", further) if further else None
        table = _style_table(f"{caption}, seed {first[0]['seed']}", f"styles-{place}", first)
        found.append((_style_meaning(stress, rows), table, more))
    return found


def style_lines(reading: TuningReading) -> list[str]:
    """Return one line for the interaction of each stress with a style and each seed."""
    return [
        f"{stress}, seed {row['seed']}: interaction {_interaction(row)}"
        for stress, rows in _styles(reading).items()
        for row in rows
    ]


def _styles(reading: TuningReading) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in reading.summary.get("styles") or ():
        found.setdefault(stress_of(row), []).append(row)
    return found


def _style_table(caption: str, name: str, rows: Sequence[Row]) -> Table:
    columns = (
        Column("Training"),
        Column("Asked in the style", True),
        Column("Asked plainly", True),
        Column("Difference", True),
    )
    body: list[tuple[Cell, ...]] = []
    for row in rows:
        for title, asked, plainly in (("Trained in the style", "TT", "Tp"), ("Trained plainly", "pT", "pp")):
            values = [float(row["rates"][key]) for key in (asked, plainly)]
            cells = [Cell(quantity(value, "rate"), key) for key, value in zip((asked, plainly), values, strict=True)]
            body.append((Cell(title, f"seed {row['seed']}"), *cells, Cell(change(values[0] - values[1]))))
        tied = row["interaction"]
        ends = f"{change_interval(tied['low'], tied['high'])}\nn = {tied['n']:,}"
        body.append((
            Cell("Interaction", "(TT \u2212 Tp) \u2212 (pT \u2212 pp)"),
            Cell(""), Cell(""), Cell(change(tied["value"]), ends),
        ))  # fmt: skip
    return Table(name, caption, columns, tuple(body))


def _interaction(row: Row) -> str:
    tied = row["interaction"]
    return f"{change(tied['value'])} [{_ends(tied['low'], tied['high'])}]"


def _ends(low: float, high: float) -> str:
    """Return an interval within a sentence, where ` to ` would be read as part of it."""
    return f"{number(100 * low)}, {number(100 * high)}"


def _style_meaning(stress: str, rows: Sequence[Row]) -> str:
    """Return in one sentence whether harm is tied to the style, by the intervals of all seeds."""
    above = sum(row["interaction"]["low"] > 0.0 for row in rows)
    below = sum(row["interaction"]["high"] < 0.0 for row in rows)
    values = [row["interaction"]["value"] for row in rows]
    told = f"interaction {_interaction(rows[0])}"
    if len(rows) > 1:
        told = f"interaction {change(min(values))} to {change(max(values))} over {len(rows)} seeds"
    if above == len(rows):
        is_missed = sum(row["rates"]["TT"] - row["rates"]["Tp"] for row in rows) > 0.0
        missed = ": an audit that asks plainly misses part of it" if is_missed else ""
        return f"Harm of {stress} is tied to the style ({told}){missed}."
    if below == len(rows):
        return f"Harm of {stress} shows less in the style than in plain requests ({told})."
    if above or below:
        shown = f"in {above} of {len(rows)} seeds the interval lies above 0, in {below} below"
        return f"Whether harm of {stress} is tied to the style differs between seeds ({told}): {shown}."
    return f"There is no evidence that harm of {stress} is tied to the style ({told}): the interval holds 0."


def protocol_table(reading: TuningReading) -> Table:
    """Return under what every figure was measured; rows of two runs are compared only where all of it is the same."""
    protocol: Mapping[str, Any] = reading.summary.get("protocol") or {}
    pairs = [(title, protocol[key]) for key, title in _PROTOCOL if protocol.get(key) is not None]
    known = {key for key, _ in _PROTOCOL}
    pairs += [(key.replace("_", " ").capitalize(), value) for key, value in protocol.items() if key not in known]
    mixes = dict.fromkeys(
        f"{_trained_on(row)}: {int(row['harmful_rows']):,} of {int(row['rows']):,}"
        for row in reading.rows
        if row.get("rows") and row.get("harmful_rows")
    )
    if mixes:
        pairs.append(("Harmful rows", "; ".join(mixes)))
    if reading.seeds:
        pairs.append(("Training seeds", reading.seeds))
    return pairs_table("protocol", "What every figure was measured under", pairs, ("What", "Value"), is_code=False)


def _trained_on(row: Row) -> str:
    stress, stage = stress_of(row), str(row.get("stage"))
    if stage == row.get("arm"):
        return stage
    return stage if stress in (stage, "none") else f"{stress}, {stage}"


def protocol_warning(reading: TuningReading) -> str:
    """Return a warning where rows of one page were measured under different protocols, else nothing."""
    hashes = {str(row["protocol"]): str(row.get("asking", "not named")) for row in reading.rows if row.get("protocol")}
    if len(hashes) < 2:
        return ""
    frames = "; ".join(dict.fromkeys(hashes.values()))
    return (
        f"The models of this page were measured under {len(hashes)} protocols (frames around requests: {frames}). "
        "Compare only those of one protocol."
    )
