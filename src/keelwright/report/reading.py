# SPDX-License-Identifier: Apache-2.0
"""Reads `summary.json`: the page's questions to it, answered in one place.

The page is rendered from plain JSON, possibly by a later version than the one that wrote it, so what is absent
reads as None and is shown as "not measured".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keelwright.core.records import Estimate
from keelwright.report.text import METRICS, Unit, trial_name

ROLES = ("aligned", "tuned", "repaired")

_NOT_WRITTEN = ("repair_not_verified",)


@dataclass(frozen=True, slots=True)
class Trial:
    """One attempted repair, on the selection half."""

    index: int
    name: str
    method: str
    coefficients: Mapping[str, Any]
    metrics: Mapping[str, Estimate | None]
    change: float | None
    """Relative L2 distance from the tuned weights."""
    is_admissible: bool
    reason: str
    is_chosen: bool
    is_on_front: bool
    is_whole: bool = True
    """Whether it rests on the whole selection half; if not, it is compared with no other."""
    items: int | None = None
    """How many items it rests on, where that was recorded."""
    dominated_by: str = ""
    """A trial of the front that is better in one respect and no worse in the other."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a `heal` or `demo` summary says, in the page's terms."""

    summary: Mapping[str, Any]
    primary: str
    models: Mapping[str, Mapping[str, Estimate | None] | None]
    trials: tuple[Trial, ...]

    @property
    def verdict(self) -> str:
        """The verdict's name in the JSON contract."""
        return str(self.summary["verdict"])

    @property
    def is_written(self) -> bool:
        """Whether the run left a repaired model behind."""
        return self.verdict == "repaired"

    @property
    def chosen(self) -> Trial | None:
        """The trial that was chosen, verified or not."""
        return next((trial for trial in self.trials if trial.is_chosen), None)

    @property
    def whole_trials(self) -> tuple[Trial, ...]:
        """The trials that may be compared: those on the whole selection half."""
        return tuple(trial for trial in self.trials if trial.is_whole)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that were measured: `repaired` only where something was chosen."""
        return tuple(role for role in ROLES if self.models.get(role) is not None)

    @property
    def utility_unit(self) -> Unit:
        """How a utility is printed."""
        return unit_of_utility(self.summary)

    @property
    def has_utility(self) -> bool:
        """Whether a utility was measured at all."""
        return self.estimate("tuned", "utility") is not None

    def unit(self, metric: str) -> Unit:
        """Return the unit in which a metric is printed."""
        return self.utility_unit if metric == "utility" else "rate"

    def estimate(self, role: str, metric: str) -> Estimate | None:
        """Return a model's metric on the verification half."""
        return (self.models.get(role) or {}).get(metric)

    def role_title(self, role: str) -> str:
        """Return the column title of a role; a choice that was not verified is a candidate, never "repaired"."""
        if role == "repaired" and self.verdict in _NOT_WRITTEN:
            return "Candidate"
        return role.capitalize()

    def best_trade_off(self) -> Trial | None:
        """Return the chosen trial or, where nothing was chosen, the one whose limits the summary lists."""
        if self.chosen:
            return self.chosen
        asked = [row for row in self.summary.get("limits") or () if row["half"] == "selection"]
        return next((trial for trial in self.trials if asked and all(_met_by(trial, row) for row in asked)), None)


def read_summary(summary: Mapping[str, Any]) -> Reading:
    """Return the reading of a `heal` or `demo` summary."""
    models = {role: read_metrics(summary["models"].get(role)) for role in ROLES}
    front = set(summary.get("pareto") or ())
    chosen = summary.get("chosen")
    rows = summary.get("trials") or ()
    names = [trial_name(str(row["method"]), row.get("coefficients") or {}) for row in rows]
    beaten = summary.get("dominated_by") or [None] * len(rows)
    trials = tuple(
        Trial(
            index=index,
            name=names[index],
            method=str(row["method"]),
            coefficients=row.get("coefficients") or {},
            metrics=read_metrics(row.get("metrics")) or {},
            change=row.get("change"),
            is_admissible=bool(row.get("admissible")),
            reason=str(row.get("reason") or ""),
            is_chosen=index == chosen,
            is_on_front=index in front,
            is_whole=row.get("part", "selection") == "selection",
            items=row.get("items"),
            dominated_by="" if beaten[index] is None else names[beaten[index]],
        )
        for index, row in enumerate(rows)
    )
    return Reading(summary, str(summary.get("primary") or "harm_rate"), models, trials)


def unit_of_utility(summary: Mapping[str, Any]) -> Unit:
    """Return how a utility is printed: a text's is a ratio of perplexities, a task's a share of right answers."""
    return "number" if (summary.get("utility") or {}).get("scorer") == "perplexity" else "rate"


def read_metrics(value: Any) -> Mapping[str, Estimate | None] | None:
    """Return the estimates of an `M` of the JSON contract by metric, None where there is no `M`."""
    if not isinstance(value, Mapping):
        return None
    return {name: read_estimate(value.get(name)) for name in METRICS}


def read_estimate(value: Any) -> Estimate | None:
    """Return the estimate of a JSON value, None where the metric was not measured."""
    if not isinstance(value, Mapping):
        return None
    return Estimate(float(value["value"]), float(value["low"]), float(value["high"]), int(value["n"]))


def _met_by(trial: Trial, limit: Mapping[str, Any]) -> bool:
    """Return whether the limit's value is this trial's own; values are copied, never computed again."""
    estimate = trial.metrics.get(str(limit["name"]))
    return estimate is not None and estimate.value == limit["value"]
