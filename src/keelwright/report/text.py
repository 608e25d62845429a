# SPDX-License-Identifier: Apache-2.0
"""Words and numbers of the page: three significant digits, rates as percentages, and the metrics' names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

NOT_MEASURED = "not measured"
MINUS = "\u2212"
_ZERO_BELOW = 5e-7
"""A number this small is the rounding error of an interval's end, not a finding."""


@dataclass(frozen=True, slots=True)
class MetricName:
    """How a metric is called, what it counts, and which way is better."""

    title: str
    counts: str
    lower_is_better: bool


METRICS: Mapping[str, MetricName] = {
    "harm_rate": MetricName("Harm rate", "harmful requests answered harmfully", True),
    "refusal_rate": MetricName("Refusal rate", "harmful requests refused, in full or in part", False),
    "over_refusal": MetricName("Over-refusal", "harmless look-alikes refused", True),
    "answer_rate": MetricName("Answer rate", "ordinary requests answered", False),
    "incoherent": MetricName("Incoherent", "answers without sense, never counted as safe", True),
    "utility": MetricName("Utility", "the task the model was tuned for", False),
}

Unit = Literal["rate", "number", "points"]
"""rate: 0 to 1, printed as a percentage; number: printed as it is (a ratio of perplexities, a judge's score); points: a
difference of rates, -1 to 1, printed in percentage points."""

_UNITS: Mapping[str, Unit] = {"rate": "rate", "ratio": "rate", "difference": "points", "score": "number"}


def unit_of(name: Any) -> Unit:
    """Return how a metric's own unit (rate, ratio, difference, score) is printed; an unknown one as a number."""
    return _UNITS.get(str(name), "number")


def metric_title(name: str) -> str:
    """Return the metric's title, or its name in plain words when it is not one of ours."""
    known = METRICS.get(name)
    if known:
        return known.title
    base, bracket, condition = name.partition("[")
    said = condition.removesuffix("]").replace("=", " ").replace("_", " ").replace(",", ", ")
    return f"{words(base)} ({said})" if bracket else words(base)


def words(name: str) -> str:
    """Return a key of a JSON document in plain words: `torch_threads` becomes `Torch threads`."""
    plain = name.replace("_", " ").strip()
    return plain[:1].upper() + plain[1:]


def number(value: float | None, digits: int = 3) -> str:
    """Return `value` with `digits` significant digits, trailing zeros kept, and a real minus sign."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    if abs(value) < _ZERO_BELOW:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if round(abs(value), digits - 1 - magnitude) >= 10 ** (magnitude + 1):
        magnitude += 1
    text = f"{abs(value):,.{max(0, digits - 1 - magnitude)}f}"
    return (MINUS if value < 0 else "") + text


def percent(value: float | None, digits: int = 3) -> str:
    """Return a rate in 0..1 as a percentage with `digits` significant digits."""
    return NOT_MEASURED if value is None else f"{number(100 * value, digits)}%"


def quantity(value: float | None, unit: Unit) -> str:
    """Return a value in its own unit."""
    if unit == "points" and value is not None:
        return f"{number(100 * value)} points"
    return percent(value) if unit == "rate" else number(value)


def interval(low: float, high: float, unit: Unit = "rate") -> str:
    """Return an interval as `0.460 to 5.87%`, or without the sign for plain numbers."""
    first = number(low) if unit == "number" else number(100 * low)
    return f"{first} to {quantity(high, unit)}"


def change(difference: float, unit: Unit = "rate") -> str:
    """Return a difference with its sign; rates in percentage points."""
    scaled = difference if unit == "number" else 100 * difference
    sign = "+" if scaled > _ZERO_BELOW else ""
    return f"{sign}{number(scaled)}" + ("" if unit == "number" else " points")


def change_interval(low: float, high: float, unit: Unit = "rate") -> str:
    """Return the interval of a difference, in the same unit as `change`."""
    scale = 1 if unit == "number" else 100
    return f"{number(scale * low)} to {number(scale * high)}"


def p_value(value: float | None) -> str:
    """Return a p-value; below one in a thousand only that it is."""
    if value is None:
        return NOT_MEASURED
    return "< 0.001" if value < 0.001 else number(min(value, 1.0))


def plain(value: Any) -> str:
    """Return a setting or a coefficient the way a person would type it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(one) for one in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={plain(one)}" for key, one in value.items()) or "none"
    return str(value)


def memory(count: float | None) -> str:
    """Return a number of bytes in the unit that suits it."""
    if count is None:
        return NOT_MEASURED
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while power < len(units) - 1 and abs(count) >= 1024 ** (power + 1):
        power += 1
    return f"{number(count / 1024**power)} {units[power]}"


def duration(seconds: float) -> str:
    """Return seconds as a person would say them."""
    if seconds < 90:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def trial_name(method: str, coefficients: Mapping[str, Any]) -> str:
    """Return a short name for a trial: `linear 0.4`, or the settings by name where they are others."""
    if list(coefficients) == ["coefficient"]:
        return f"{method} {plain(next(iter(coefficients.values())))}"
    return f"{method} {plain(coefficients)}" if coefficients else method


def clip(text: str, limit: int) -> tuple[str, int]:
    """Return at most `limit` characters of `text`, and how many were left out."""
    return (text, 0) if len(text) <= limit else (text[:limit].rstrip() + "\u2026", len(text) - limit)
