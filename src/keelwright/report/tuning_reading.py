# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of a run that trains and measures: arms, the order of steps, and the lines of a figure.

An arm is one model's fate: untouched at the start, tuned as it is, or tuned with a defence. Rows are plain JSON,
possibly of another version, so what is absent reads as "not measured".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from keelwright.core.records import Estimate
from keelwright.report.line_chart import Series, Spot
from keelwright.report.reading import read_estimate, unit_of_utility
from keelwright.report.svg import SHAPES
from keelwright.report.text import METRICS, Unit, interval, metric_title, quantity, words

Row = Mapping[str, Any]

_COLOURS: Final[Mapping[str, int]] = {
    "start": 0,
    "undefended": 1,
    "tuned": 1,
    "defended": 2,
    "clean": 3,
    "control": 4,
    "more alignment": 4,
    "positive control": 5,
}
"""Numbers of the colours of arms that every run may have; others take the rest in order."""
_OTHER_COLOURS: Final = (2, 6, 7, 8, 9, 3)
_BEFORE: Final = ("start", "hardening")
_CONTROL: Final = "positive control"


@dataclass(frozen=True, slots=True)
class Arm:
    """What was done to the model under one stress, and every measurement of it."""

    title: str
    """What it is called beside other arms of its stress."""
    name: str
    """What it is called where arms of several stresses stand together."""
    class_: str
    """`role-arm-1` and the like: its colour on the page, the same under every stress."""
    shape: str
    rows: tuple[Row, ...]
    """In the order in which they were measured, at least one."""

    @property
    def key(self) -> tuple[str, str]:
        """The stress and the arm, as costs and logs name them."""
        return stress_of(self.rows[0]), str(self.rows[0].get("arm"))

    @property
    def is_start(self) -> bool:
        """Whether this is the model before anything was done to it."""
        return all(row.get("stage") == "start" for row in self.rows)

    @property
    def is_tuned(self) -> bool:
        """Whether a tuning of it was measured."""
        return any(_is_tuning(row) for row in self.rows)

    @property
    def is_control(self) -> bool:
        """Whether this is the tuning that is known to break a model."""
        return self.key[1] == _CONTROL

    @property
    def is_comparison(self) -> bool:
        """Whether this is what a defence is compared with, not a defence."""
        return self.key[1] in _COLOURS and self.key[1] != "defended"

    @property
    def role(self) -> str:
        """The class without its prefix, as tables and answers name it."""
        return self.class_.removeprefix("role-")

    @property
    def last(self) -> Row:
        """The last measurement, of the first seed."""
        first = min(_seed(row) for row in self.rows)
        return [row for row in self.rows if _seed(row) == first][-1]


@dataclass(frozen=True, slots=True)
class TuningReading:
    """What the summary of `stress`, `harden` or `tune` says, in the page's terms."""

    summary: Mapping[str, Any]
    rows: tuple[Row, ...]
    primary: str
    arms: tuple[Arm, ...]
    stresses: tuple[str, ...]
    """Those that a model was tuned with, without the control's own; empty where nothing was tuned."""
    offsets: Mapping[tuple[str, str], float]
    """By stress and stage: steps of the stages before it."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds, in order."""
        return tuple(sorted({_seed(row) for row in self.rows}))

    @property
    def is_tuned(self) -> bool:
        """Whether a tuning was measured, not only a hardening."""
        return bool(self.offsets)

    def unit(self, metric: str) -> Unit:
        """Return the unit in which a metric is printed."""
        return unit_of_utility(self.summary) if metric == "utility" else "rate"

    def is_measured(self, metric: str) -> bool:
        """Return whether any row has the metric."""
        return any(estimate_of(row, metric) is not None for row in self.rows)

    def step_of(self, row: Row) -> float:
        """Return where a row lies on the horizontal axis: a tuning begins at 0, whatever came before it."""
        offset = self.offsets.get((stress_of(row), str(row.get("stage"))))
        if offset is not None:
            return offset + _step(row)
        return 0.0 if self.is_tuned or row.get("stage") == "start" else _step(row)

    def arms_of(self, stress: str | None) -> tuple[Arm, ...]:
        """Return the arms of one stress with the control, or of all; without starts where there is more to show."""
        own = [arm for arm in self.arms if stress is None or arm.key[0] == stress or arm.is_control]
        return tuple(arm for arm in own if not arm.is_start and (arm.is_tuned or not self.is_tuned)) or self.arms


def read_tuning(summary: Mapping[str, Any]) -> TuningReading:
    """Return the reading of a summary of `stress`, `harden` or `tune`."""
    rows = tuple(summary.get("rows") or ())
    knows_harm = any(estimate_of(row, "harm_rate") is not None for row in rows)
    primary = str(summary.get("primary") or ("harm_rate" if knows_harm else "refusal_rate"))
    tuned = [row for row in rows if _is_tuning(row)]
    stresses = tuple(dict.fromkeys(stress_of(row) for row in tuned if row.get("arm") != _CONTROL))
    return TuningReading(summary, rows, primary, _arms(rows, stresses), stresses, _offsets(tuned))


def estimate_of(row: Row, metric: str) -> Estimate | None:
    """Return one metric of a row, None where it was not measured."""
    return read_estimate((row.get("metrics") or {}).get(metric))


def stress_of(row: Row) -> str:
    """Return the stress that a row belongs to; runs without one have a single nameless one."""
    return str(row.get("stress") or "none")


def _is_tuning(row: Row) -> bool:
    return row.get("stage") not in _BEFORE


def _step(row: Row) -> float:
    return float(row.get("step") or 0)


def _seed(row: Row) -> int:
    return int(row.get("seed") or 0)


def _title(row: Row) -> str:
    title = str(row.get("title") or row.get("arm") or "not named")
    # `k = 50` names a setting, and settings are not capitalised.
    return title if " = " in title else words(title)


def _arms(rows: Sequence[Row], stresses: Sequence[str]) -> tuple[Arm, ...]:
    looks = _looks(rows)
    groups: dict[tuple[str, str], list[Row]] = {}
    known: set[str] = set()
    for row in rows:
        # Several stresses may be held against one start: it is one model, and stands in the tables once.
        model_id = str(row.get("model_id") or "")
        if row.get("stage") == "start" and model_id in known:
            continue
        known |= {model_id} - {""}
        groups.setdefault((stress_of(row), _title(row)), []).append(row)
    starts = sum(row[0].get("stage") == "start" for row in groups.values())
    found = []
    for (stress, title), own in groups.items():
        name = title
        if own[0].get("stage") == "start":
            name = f"{title}, {stress}" if starts > 1 else title
        elif stresses and not any(_is_tuning(row) for row in own):
            name = f"{title}, no stress"
        elif len(stresses) > 1 and stress in stresses:
            name = f"{title}, {stress}"
        colour, shape = looks[title]
        found.append(Arm(title, name, f"role-arm-{colour}", shape, tuple(own)))
    return tuple(found)


def _looks(rows: Sequence[Row]) -> dict[str, tuple[int, str]]:
    """Return the number of the colour and the mark of every title."""
    found: dict[str, tuple[int, str]] = {}
    for row in rows:
        title = _title(row)
        if title in found:
            continue
        taken = {colour for colour, _ in found.values()}
        colour = _COLOURS.get(str(row.get("arm")))
        if colour is None or colour in taken:
            colour = next((one for one in _OTHER_COLOURS if one not in taken), 1 + len(found) % 9)
        found[title] = (colour, SHAPES[len(found) % len(SHAPES)])
    return found


def _offsets(tuned: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Return where each stage of a tuning begins on the axis: after the stages before it in the same arm.

    Arms may go through different stages; one that was measured in its last stage only takes the place from the others.
    """
    arms: dict[tuple[str, str], dict[str, float]] = {}
    for row in tuned:
        own, stage = arms.setdefault((stress_of(row), _title(row)), {}), str(row.get("stage"))
        own[stage] = max(own.get(stage, 0.0), _step(row))
    found: dict[tuple[str, str], float] = {}
    for (stress, _), stages in arms.items():
        begin = 0.0
        for stage, steps in stages.items():
            found[stress, stage] = max(found.get((stress, stage), 0.0), begin)
            begin += steps
    return found


def lines_of(reading: TuningReading, metric: str, stress: str | None = None) -> tuple[Series, ...]:
    """Return one line per arm: with one seed its intervals are the band, with several the range over seeds.

    Args:
        reading: The summary.
        metric: What the lines show.
        stress: Only arms of this stress, and the control; None takes all.
    """
    found = []
    for arm in reading.arms_of(stress):
        by_step = _by_step(reading, arm, metric)
        spots = [_spot(reading, arm, metric, x, by_step[x]) for x in sorted(by_step)]
        if spots:
            found.append(Series(arm.title, arm.class_, arm.shape, tuple(spots)))
    return tuple(found)


def _by_step(reading: TuningReading, arm: Arm, metric: str) -> dict[float, list[Estimate]]:
    """Return an arm's estimates by place on the axis, its begin included."""
    rows = list(arm.rows)
    if reading.is_tuned:
        # A tuning begins at the last model of the hardening, or where there was none, at the start.
        hardened = [row for row in rows if row.get("stage") == "hardening"]
        end = max((_step(row) for row in hardened), default=0.0)
        begins = [row for row in hardened if _step(row) == end] or _start_of(reading, arm)
        rows = [*begins, *(row for row in rows if _is_tuning(row))]
    elif not arm.is_start:
        rows = [*_start_of(reading, arm), *(row for row in rows if row.get("stage") != "start")]
    found: dict[float, list[Estimate]] = {}
    for row in rows:
        estimate = estimate_of(row, metric)
        if estimate is not None:
            found.setdefault(reading.step_of(row), []).append(estimate)
    return found


def _start_of(reading: TuningReading, arm: Arm) -> list[Row]:
    """Return the start that an arm was trained from; none where it was not asked in the arm's own frame."""
    starts = [row for row in reading.rows if row.get("stage") == "start"]
    own = [row for row in starts if stress_of(row) == arm.key[0]] or starts
    return [row for row in own if row.get("asking") == arm.rows[0].get("asking")][:1]


def _spot(reading: TuningReading, arm: Arm, metric: str, x: float, estimates: Sequence[Estimate]) -> Spot:
    values = [one.value for one in estimates]
    mean, unit = sum(values) / len(values), reading.unit(metric)
    if len(estimates) == 1:
        one = estimates[0]
        # Among ranges over seeds an interval over items would pass for one of them.
        low, high = (one.low, one.high) if len(reading.seeds) < 2 else (mean, mean)
        more = f"{interval(one.low, one.high, unit)}, n = {one.n:,}"
    else:
        low, high = min(values), max(values)
        more = f"mean of {len(values)} seeds, from {quantity(low, unit)} to {quantity(high, unit)}"
    tip = f"{arm.title}, step {x:,g}\n{metric_title(metric)} {quantity(mean, unit)} ({more})"
    return Spot(x, mean, low, high, tip)


def shown_metrics(reading: TuningReading) -> tuple[str, ...]:
    """Return the metrics that any row has, the primary one first."""
    found = [name for name in METRICS if reading.is_measured(name)]
    return tuple(sorted(found, key=lambda name: name != reading.primary))
