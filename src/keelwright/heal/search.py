# SPDX-License-Identifier: Apache-2.0
"""Where to try next: a coarse grid, then bisection towards the smallest change that restores safety.

Strength is the distance of a coefficient from the method's neutral one, which leaves the tuned model as it is. Along
strength, safety grows and, sooner or later, a limit breaks. The search narrows the gap beside the best trial so far: on
the weaker side when that trial already restores safety, on the stronger side when it does not yet.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from keelwright.core.protocols import SearchSpace

RESOLUTION = 0.02
"""Two coefficients closer than this are not told apart: the lab's selection halves cannot."""

_DECADES = 100.0
"""A grid whose ends lie this many times apart is searched by ratios."""
_CLOSE_RATIO = 1.2
"""On such a grid, two values closer than this are not told apart."""


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


def next_coefficient(space: SearchSpace, tried: Sequence[Tried], *, out: Collection[float] = ()) -> float | None:
    """Return the coefficient to try next, or None when the search has nothing left to learn.

    Args:
        space: The method's neutral coefficient and grid.
        tried: All trials of this method so far, in any order.
        out: Values at which the method could not be applied.

    Returns:
        A grid point that was not tried yet; then the middle of the gap beside the best trial; None when that gap is
        narrower than `RESOLUTION`.
    """
    known = {trial.coefficient for trial in tried} | set(out)
    for point in space.grid:
        if point not in known:
            return point
    found = _refinement(space, tried)
    # Where the value between is known to fail there is no way of narrowing down further.
    return None if found in known else found


def _refinement(space: SearchSpace, tried: Sequence[Tried]) -> float | None:
    middle = functools.partial(_middle, is_geometric=is_geometric(space))
    ordered = sorted(tried, key=lambda trial: abs(trial.coefficient - space.neutral))
    best = next((trial for trial in ordered if trial.is_best), None)
    if best is None:
        return _between_least_broken(space, ordered, middle)
    place = ordered.index(best)
    if best.is_restored:
        weaker = ordered[place - 1].coefficient if place > 0 else space.neutral
        return middle(weaker, best.coefficient)
    stronger = ordered[place + 1 :]
    return middle(best.coefficient, stronger[0].coefficient) if stronger else None


def is_geometric(space: SearchSpace) -> bool:
    """Whether the grid spans orders of magnitude, so that steps between its points are ratios."""
    return min(space.grid, default=0.0) > 0.0 and max(space.grid) / min(space.grid) >= _DECADES


def _between_least_broken(
    space: SearchSpace, ordered: Sequence[Tried], middle: Callable[[float, float], float | None]
) -> float | None:
    """Nothing is admissible: look between the trial that misses least and the better of its neighbours."""
    if not ordered:
        return None
    place = min(range(len(ordered)), key=lambda index: ordered[index].shortfall)
    beside = [ordered[index] for index in (place - 1, place + 1) if 0 <= index < len(ordered)]
    if not beside:
        return middle(space.neutral, ordered[place].coefficient)
    other = min(beside, key=lambda trial: trial.shortfall)
    return middle(other.coefficient, ordered[place].coefficient)


def _middle(one: float, other: float, *, is_geometric: bool) -> float | None:
    if is_geometric and min(one, other) > 0.0:
        found = float(f"{math.sqrt(one * other):.3g}")
        return None if max(one, other) / min(one, other) < _CLOSE_RATIO else found
    return None if abs(one - other) < 2 * RESOLUTION else round((one + other) / 2, 4)
