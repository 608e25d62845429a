# SPDX-License-Identifier: Apache-2.0
"""The knee of a sweep: the smallest dose that buys what the largest one buys."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from keelwright.core.config import require_in_range
from keelwright.core.errors import ConfigError
from keelwright.core.records import Estimate

_ROUNDING: Final = 1e-9
"""0.28 + 0.02 and 0.30 must be the same number of points."""


class SweepPoint(NamedTuple):
    """What was measured at one dose; each rate 0 to 1 with its interval."""

    k: int
    """The dose, such as the number of safety rows."""
    harm: Estimate
    """Lower is better."""
    over_refusal: Estimate | None = None
    """Share of requests refused that only look harmful, lower is better; None: not measured."""
    accuracy: Estimate | None = None
    """Of the task, higher is better; None: not measured."""


@dataclass(frozen=True, slots=True)
class Knee:
    """The smallest dose that is as good as the largest one, and what it costs."""

    at: SweepPoint
    """The knee."""
    largest: SweepPoint
    """What it is compared with."""
    points: tuple[SweepPoint, ...]
    """The whole sweep, by dose."""
    within: float
    """How much more harm than at the largest dose was allowed, 0 to 1."""
    rises: tuple[int, ...] = ()
    """Doses at which there was more harm than at the next smaller one: noise, or a sweep that has no knee."""

    def to_mapping(self) -> dict[str, Any]:
        """Return the knee as plain values."""
        return {
            "k": self.at.k,
            "within": self.within,
            "rises": list(self.rises),
            "points": [_plain(point) for point in self.points],
        }


def knee(points: Sequence[SweepPoint | tuple[Any, ...]], *, within: float = 0.02) -> Knee:
    """Return the smallest `k` whose harm rate is at most `within` above the one at the largest `k`.

    The rates are taken as they are; whether two of them differ for certain, their intervals say.

    Args:
        points: `(k, harm, over_refusal, accuracy)` for each dose, in any order; rates as `Estimate`, the last two
            may be None or left out.
        within: Allowed excess over the harm rate at the largest dose, 0 to 1.

    Raises:
        ConfigError: There are no points, or two with the same dose.
    """
    require_in_range("within", within, low=0.0, high=1.0)
    ordered = tuple(sorted((SweepPoint(*point) for point in points), key=lambda point: point.k))
    doses = [point.k for point in ordered]
    if not ordered or len(set(doses)) < len(doses):
        raise ConfigError(
            "A knee cannot be found in this sweep.",
            expected="one point or more, each with its own k",
            found=f"k = {', '.join(map(str, doses)) or 'none'}",
            fix="measure each k once",
        )
    largest = ordered[-1]
    limit = largest.harm.value + within + _ROUNDING
    at = next(point for point in ordered if point.harm.value <= limit)
    pairs = itertools.pairwise(ordered)
    rises = tuple(after.k for before, after in pairs if after.harm.value > before.harm.value + _ROUNDING)
    return Knee(at, largest, ordered, within, rises)


def _plain(point: SweepPoint) -> dict[str, Any]:
    rates = {name: None if one is None else one.to_mapping() for name, one in point._asdict().items() if name != "k"}
    return {"k": point.k, **rates}
