# SPDX-License-Identifier: Apache-2.0
"""The tables of a run that trains and measures: every measurement, paired changes, differences over seeds, protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from keelwright.report.tables import Cell, Column, Table, changes_table, estimate_cell, pairs_table, split_changes
from keelwright.report.text import METRICS, change, change_interval, metric_title, p_value, plain
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
    caption = f"Paired tests on the same items ({len(rows)} comparisons); p also corrected by Holm"
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


def claims_table(reading: TuningReading) -> Table | None:
    """Return how arms differ over training seeds at their last steps, or None with too few seeds to say."""
    claims = reading.summary.get("claims") or ()
    ends: dict[tuple[Any, Any], float] = {}
    for row in claims:
        key = (row["stress"], row["arm"])
        ends[key] = max(ends.get(key, 0.0), reading.step_of(row))
    last = [row for row in claims if reading.step_of(row) == ends[row["stress"], row["arm"]]]
    if not last:
        return None
    columns = (
        Column("Difference over seeds"),
        Column("Mean", True),
        Column("95% interval", True),
        Column("p", True, note="not corrected"),
        Column("Seeds", True),
        Column("Test"),
    )
    several = len({row["stress"] for row in last}) > 1
    return Table("claims", "Arms compared over training seeds, at the last step", columns, tuple(
        _claim_row(row, reading, has_stresses=several) for row in last
    ))  # fmt: skip


def _claim_row(row: Row, reading: TuningReading, *, has_stresses: bool) -> tuple[Cell, ...]:
    metric = str(row["metric"])
    unit = reading.unit(metric)
    told = f"{row['against']} to {row['arm']}, step {int(row['step']):,}"
    told += f", {row['stress']}" if has_stresses else ""
    low, high = float(row["low"]), float(row["high"])
    return (
        Cell(metric_title(metric), told),
        Cell(change(float(row["difference"]), unit)),
        Cell(change_interval(low, high, unit)),
        Cell(p_value(row.get("p_value"))),
        Cell(str(row["seeds"])),
        Cell(str(row.get("test") or "")),
    )


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
