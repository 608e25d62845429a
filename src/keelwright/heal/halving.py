# SPDX-License-Identifier: Apache-2.0
"""Successive halving: many methods on few items, few methods on all items of the selection half.

Up to `FULL_RACE` methods are all tried on the whole selection half. With more, the first round tries every method over
its grid on a quarter of that half and keeps the better half of the methods; the second round does the same on half of
it; those left are searched on all of it. Rounds are skipped once no more than `FULL_RACE` methods are left.

The rounds' items are nested: each round asks only what the round before did not, because answers are kept. Each holds
about its share of every kind and hazard, whole clusters, at least one of each. Verification items are never touched.

A round judges with its intervals in mind, because it has few items: a trial counts as out of bounds only where the
whole interval of a metric lies beyond its limit, and two trials are told apart by safety only where the paired test
does. Methods are ranked by their best trial: those within bounds first; among them those whose safety is not
significantly worse than the best one's, the admissible before the others and then the smallest change first; then the
rest by safety. The final choice rests on the whole selection half and on the strict limits.

Source:
    Jamieson, Talwalkar: Non-stochastic Best Arm Identification and Hyperparameter Optimization, arXiv 1502.07943.
    There an arm is a configuration; here it is a method with its grid, so that a method is judged at its best.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

from keelwright.core.records import Item
from keelwright.core.seeds import derive_seed
from keelwright.heal.decide import Floors, LimitCheck, Measured, Trial, is_worse

Rung = Literal["quarter", "half"]

RUNGS: Final[tuple[Rung, ...]] = ("quarter", "half")
"""The rounds before the last, in order."""

SHARES: Final[Mapping[str, float]] = {"quarter": 0.25, "half": 0.5}
"""Share of the selection half that a round asks."""

PART_WORDS: Final[Mapping[str | None, str]] = {
    "quarter": "a quarter of the selection half",
    "half": "half of the selection half",
    None: "all of it",
}

FULL_RACE: Final = 3
"""So many methods are tried on the whole selection half without any round before."""


def nested_part(items: Sequence[Item], share: float, *, seed: int) -> tuple[Item, ...]:
    """Return about a share of the items, of equal make-up; a smaller share returns a subset of a larger one's.

    Clusters stay together. Within each kind and hazard they are shuffled by the seed, and the first ones are taken, at
    least one. The part depends on ids and seed alone; the order of `items` is kept.

    Args:
        items: The selection half.
        share: 0 to 1.
        seed: The run's seed.
    """
    members: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        members[item.cluster_id or item.item_id].append(item)
    strata: dict[tuple[str, str], list[str]] = defaultdict(list)
    for cluster, inside in members.items():
        first = min(inside, key=lambda item: item.item_id)
        strata[(first.kind, first.hazard)].append(cluster)
    taken: set[str] = set()
    for clusters in strata.values():
        order = sorted(clusters, key=lambda cluster: (derive_seed(seed, "rounds", cluster), cluster))
        taken.update(order[: max(1, math.ceil(share * len(order) - 1e-9))])
    return tuple(item for item in items if (item.cluster_id or item.item_id) in taken)


def rounds_for(methods: int) -> list[tuple[Rung | None, int]]:
    """Return how many methods take part in each round; the last one is on the whole selection half (None).

    >>> rounds_for(3)
    [(None, 3)]
    >>> rounds_for(20)
    [('quarter', 20), ('half', 10), (None, 5)]
    """
    found: list[tuple[Rung | None, int]] = []
    for rung in RUNGS:
        if methods <= FULL_RACE:
            break
        found.append((rung, methods))
        methods = survivors(methods)
    return [*found, (None, methods)]


def survivors(methods: int) -> int:
    """Return how many methods a round keeps: the better half, but never fewer than `FULL_RACE`."""
    return max(min(methods, FULL_RACE), math.ceil(methods / 2))


def most_trials(grids: Sequence[int], refinements: int) -> tuple[int, float]:
    """Return the most trials that a race can take, and what they cost in passes over the selection half.

    Args:
        grids: Number of grid points of each method.
        refinements: Trials per method after its grid, in the last round.
    """
    rounds = rounds_for(len(grids))
    refined = rounds[-1][1] * refinements
    passes, seen = float(refined), 0.0
    for rung, count in rounds:
        share = SHARES[rung] if rung is not None else 1.0
        # Answers of the round before are kept: a grid point costs only the items that are new to it.
        passes += sum(sorted(grids, reverse=True)[:count]) * (share - seen)
        seen = share
    return sum(grids) + refined, passes


def is_within_bounds(trial: Trial) -> bool:
    """Whether no limit is clearly missed: the interval of each metric reaches its limit."""
    return not any(_clearly_missed(trial, check) for check in trial.checks)


def best_of(trials: Sequence[Trial], *, floors: Floors, aligned: Measured | None) -> Trial:
    """Return the best of a method's trials in one round.

    Args:
        trials: At least one, all on the same items.
        floors: The level of the tests.
        aligned: The aligned model on these items where there is no utility, so that its safety is what is asked for.
    """
    within = [trial for trial in trials if is_within_bounds(trial)]
    if not within:
        return min(trials, key=lambda trial: (trial.shortfall, _bad(trial), trial.change))
    return min(within, key=_order(within, floors=floors, aligned=aligned))


def keep_better(
    trials: Mapping[str, Sequence[Trial]], keep: int, *, floors: Floors, aligned: Measured | None
) -> list[str]:
    """Return the methods that go on to the next round, in the order in which they were given.

    Args:
        trials: By method, at least one each, all on the same items.
        keep: How many go on.
        floors: The level of the tests.
        aligned: As in `best_of`.
    """
    best = {method: best_of(tried, floors=floors, aligned=aligned) for method, tried in trials.items()}
    within = [trial for trial in best.values() if is_within_bounds(trial)]
    order = _order(within, floors=floors, aligned=aligned)

    def place(method: str) -> tuple[int, tuple[float, ...]]:
        trial = best[method]
        if trial in within:
            return 0, order(trial)
        return 1, (trial.shortfall, _bad(trial), trial.change)

    # The sort is stable: methods that nothing tells apart keep their order.
    kept = set(sorted(best, key=place)[:keep])
    return [method for method in trials if method in kept]


def _order(
    trials: Sequence[Trial], *, floors: Floors, aligned: Measured | None
) -> Callable[[Trial], tuple[float, ...]]:
    """Return the sort key of trials within bounds: those as safe as the safest first, then the smallest change."""
    safest = min(trials, key=lambda trial: (_bad(trial), trial.change), default=None)
    reference = aligned or (safest.measured if safest is not None else None)

    def key(trial: Trial) -> tuple[float, ...]:
        if reference is None or not is_worse(trial.measured, reference, floors):
            return 0.0, float(not trial.admissible), trial.change
        return 1.0, float(_bad(trial)), trial.change

    return key


def _bad(trial: Trial) -> int:
    return sum(trial.measured.bad.values())


def _clearly_missed(trial: Trial, check: LimitCheck) -> bool:
    estimate = getattr(trial.measured.metrics, check.name)
    if check.held or estimate is None:
        return False
    return bool(estimate.high < check.limit if check.at_least else estimate.low > check.limit)
