# SPDX-License-Identifier: Apache-2.0
"""Where to try next: a coarse grid, then bisection towards the smallest change that restores safety.

Strength is the distance of a coefficient from the method's neutral one, which leaves the tuned model as it is. Along
strength, safety grows and, sooner or later, a limit breaks. The search narrows the gap beside the best trial so far: on
the weaker side when that trial already restores safety, on the stronger side when it does not yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keelwright.core.protocols import SearchSpace

RESOLUTION = 0.02
"""Two coefficients closer than this are not told apart: the lab's selection halves cannot."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What the search needs to know of a trial."""

    coefficient: float
    is_best: bool
    """The one that would be chosen among this method's admissible trials so far."""
    is_restored: bool
    """Its safety does not differ significantly from the aligned model's."""
    shortfall: float
    """How far the broken limits are missed, added up; 0 when admissible."""


def next_coefficient(space: SearchSpace, tried: Sequence[Tried]) -> float | None:
    """Return the coefficient to try next, or None when the search has nothing left to learn.

    Args:
        space: The method's neutral coefficient and grid.
        tried: All trials of this method so far, in any order.

    Returns:
        A grid point that was not tried yet; then the middle of the gap beside the best trial; None when that gap is
        narrower than `RESOLUTION`.
    """
    known = {trial.coefficient for trial in tried}
    for point in space.grid:
        if point not in known:
            return point
    ordered = sorted(tried, key=lambda trial: abs(trial.coefficient - space.neutral))
    best = next((trial for trial in ordered if trial.is_best), None)
    if best is None:
        return _between_least_broken(space, ordered)
    place = ordered.index(best)
    if best.is_restored:
        weaker = ordered[place - 1].coefficient if place > 0 else space.neutral
        return _middle(weaker, best.coefficient)
    stronger = ordered[place + 1 :]
    return _middle(best.coefficient, stronger[0].coefficient) if stronger else None


def _between_least_broken(space: SearchSpace, ordered: Sequence[Tried]) -> float | None:
    """Nothing is admissible: look between the trial that misses least and the better of its neighbours."""
    if not ordered:
        return None
    place = min(range(len(ordered)), key=lambda index: ordered[index].shortfall)
    beside = [ordered[index] for index in (place - 1, place + 1) if 0 <= index < len(ordered)]
    if not beside:
        return _middle(space.neutral, ordered[place].coefficient)
    other = min(beside, key=lambda trial: trial.shortfall)
    return _middle(other.coefficient, ordered[place].coefficient)


def _middle(one: float, other: float) -> float | None:
    return None if abs(one - other) < 2 * RESOLUTION else round((one + other) / 2, 4)
