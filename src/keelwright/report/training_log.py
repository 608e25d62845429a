# SPDX-License-Identifier: Apache-2.0
"""Reads what training cost and recorded: by cell (stress, arm, seed) and stage, or of one run alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keelwright.report.tables import Cell, Column, Table, pairs_table
from keelwright.report.text import NOT_MEASURED, duration, memory, number, words
from keelwright.report.tuning_reading import Arm, TuningReading

_SEED = "seed "


@dataclass(frozen=True, slots=True)
class Course:
    """One figure of one training run, a value per step."""

    title: str
    arm: str
    """Empty where the run has one arm."""
    class_: str
    shape: str
    values: Sequence[Any]
    """Where a step has no number, None."""


def courses_of(reading: TuningReading) -> list[Course]:
    """Return the losses, then the further figures, of every arm's training; of several seeds those of the first."""
    log: Mapping[str, Any] = reading.summary.get("log") or {}
    if _is_one_run(log):
        return _courses(log, "", None)
    found = [one for arm, stage, kept in _first_seeds(reading, log) for one in _courses(kept, stage, arm)]
    # Arms share a chart: the losses of all of them first.
    order = list(dict.fromkeys(one.title for one in found))
    return sorted(found, key=lambda one: (not one.title.startswith("Loss"), order.index(one.title)))


def cost_table(reading: TuningReading) -> Table | None:
    """Return what the training cost, or None where it was not recorded."""
    cost: Mapping[str, Any] = reading.summary.get("cost") or {}
    if not cost:
        return None
    if not all(isinstance(one, Mapping) for one in cost.values()):
        return _one_run_cost(cost)
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for key, arm, _, stages in _cells(reading, cost):
        for stage, one in stages.items():
            groups.setdefault((arm.name if arm else key, stage), []).append(one)
    rows = [_cost_row(name, stage, seeds) for (name, stage), seeds in groups.items()]
    columns: tuple[Column, ...] = (
        Column("Training"),
        Column("Steps", True),
        Column("Passes a step", True, note="plain tuning 1"),
        Column("Time", True),
        Column("A step", True),
    )
    if all(row[2].text == "" for row in rows):
        columns = (*columns[:2], *columns[3:])
        rows = [(*row[:2], *row[3:]) for row in rows]
    return Table("cost", "What the training cost, measuring left out", columns, tuple(rows))


def _cost_row(name: str, stage: str, seeds: Sequence[Mapping[str, Any]]) -> tuple[Cell, ...]:
    """Return one training's row; of several seeds the mean time."""
    first = seeds[0]
    told = words(stage) + (f", mean of {len(seeds)} seeds" if len(seeds) > 1 else "")
    seconds = [float(one["seconds"]) for one in seeds if one.get("seconds") is not None]
    mean = sum(seconds) / len(seconds) if seconds else None
    steps = int(first.get("steps") or 0)
    return (
        Cell(name, told),
        Cell(f"{steps:,}" if steps else NOT_MEASURED),
        Cell("" if first.get("passes_per_step") is None else number(float(first["passes_per_step"]))),
        Cell(NOT_MEASURED if mean is None else duration(mean)),
        Cell(NOT_MEASURED if mean is None or not steps else duration(mean / steps)),
    )


def _is_one_run(log: Mapping[str, Any]) -> bool:
    return any(isinstance(log.get(name), Sequence) for name in ("loss", "losses"))


def _courses(log: Mapping[str, Any], stage: str, arm: Arm | None) -> list[Course]:
    told = f", {stage}" if stage else ""
    values = {"Loss": log.get("losses") or log.get("loss") or (), **(log.get("figures") or {})}
    look = (arm.title, arm.class_, arm.shape) if arm else ("", "role-course", "circle")
    return [Course(f"{words(str(name))}{told}", *look, one) for name, one in values.items() if len(one)]


def _cells(
    reading: TuningReading, found: Mapping[str, Any]
) -> Iterator[tuple[str, Arm | None, str, Mapping[str, Mapping[str, Any]]]]:
    """Yield key, arm, seed and what is known by stage, of every cell."""
    arms = {arm.key: arm for arm in reading.arms}
    for key, stages in found.items():
        parts = key.split(" / ")
        arm = arms.get((parts[0], parts[1])) if len(parts) == 3 else None
        yield key, arm, parts[-1].removeprefix(_SEED), stages


def _first_seeds(reading: TuningReading, log: Mapping[str, Any]) -> Iterator[tuple[Arm | None, str, Mapping[str, Any]]]:
    """Yield each training once: of several seeds the first, and a hardening that several stresses share once."""
    known: set[tuple[str, str]] = set()
    for key, arm, _, stages in _cells(reading, log):
        for stage, kept in stages.items():
            is_shared = stage == "hardening" or arm is None or len(reading.stresses) < 2 or arm.is_control
            told = stage if is_shared else f"{arm.key[0]}: {stage}" if arm and arm.key[0] != stage else stage
            name = (arm.title if arm else key, told)
            if name not in known:
                known.add(name)
                yield arm, told, kept


def _one_run_cost(cost: Mapping[str, Any]) -> Table | None:
    shown: Mapping[str, tuple[str, Callable[[float], str]]] = {
        "passes_per_step": ("Passes a step, plain tuning being 1", number),
        "seconds_per_step": ("Time of a step", duration),
        "steps": ("Steps", lambda value: f"{int(value):,}"),
        "peak_bytes": ("Most memory in use", memory),
    }
    pairs = [
        (title, say(cost[key]) if cost[key] is not None else NOT_MEASURED)
        for key, (title, say) in shown.items()
        if key in cost
    ]
    return pairs_table("cost", "What the training cost", pairs, ("What", "Value"), is_code=False) if pairs else None
