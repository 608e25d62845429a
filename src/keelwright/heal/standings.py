# SPDX-License-Identifier: Apache-2.0
"""Where each trial and each method ended: the Pareto front, what dominates what, and the race in a table's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keelwright.heal.decide import Floors, Measured, Trial, pareto_front
from keelwright.heal.halving import best_of
from keelwright.heal.outcome import Outcome
from keelwright.heal.trials import Failure


def front_of(trials: Sequence[Trial]) -> list[int]:
    """Return the indices of the trials on the one front of safety against utility.

    Without a utility the smallness of the change takes its place. Only trials on the whole selection half are
    compared: a part of it would flatter or wrong a trial.
    """
    whole = [index for index, trial in enumerate(trials) if trial.is_whole]
    return [whole[place] for place in pareto_front([_point(trials[index]) for index in whole])]


def dominated_by(trials: Sequence[Trial]) -> list[int | None]:
    """Return, per trial, a trial of the front that is at least as good in both respects and better in one.

    None for the front itself and for trials on a part of the selection half. Of several, the safest is named.
    """
    front = front_of(trials)
    return [
        None if index in front or not trial.is_whole else _dominator(trial, trials, front)
        for index, trial in enumerate(trials)
    ]


def race_rows(
    outcome: Outcome, methods: Sequence[str], left_out: Mapping[str, str], *, floors: Floors, aligned: Measured | None
) -> list[dict[str, Any]]:
    """Return what became of every method, in the order in which methods were tried, those left out last.

    Args:
        outcome: With its race; empty where nothing was tried.
        methods: Those that took part.
        left_out: Why the others did not, by name.
        floors: The level of the tests.
        aligned: The aligned model on the selection half where there is no utility.
    """
    race = outcome.race
    if race is None:
        return []
    rows = []
    for method in methods:
        tried = [trial for trial in race.trials if trial.method == method]
        failed = [failure for failure in race.failures if failure.method == method]
        ended = "failed" if not tried else "left_behind" if method in race.dropped else "finalist"
        if outcome.chosen is not None and outcome.chosen.method == method:
            ended = "chosen"
        # On a part of the items the aligned model's own figures there are gone, and the best trial is by safety.
        reference = aligned if tried and tried[0].is_whole else None
        best = _best(tried, outcome.chosen, floors=floors, aligned=reference)
        rows.append(
            {
                "method": method,
                "ended": ended,
                "round": race.dropped.get(method, "selection") if tried else None,
                "items": max((trial.items for trial in tried), default=0),
                "best": None if best is None else race.trials.index(best),
                "text": _failures_in_words(failed),
            }
        )
    rows += [
        {"method": name, "ended": "left_out", "round": None, "items": 0, "best": None, "text": reason}
        for name, reason in left_out.items()
    ]
    return rows


def _best(tried: Sequence[Trial], chosen: Trial | None, *, floors: Floors, aligned: Measured | None) -> Trial | None:
    if chosen is not None and chosen in tried:
        return chosen
    # In the first rounds a limit missed by chance is no limit missed; in the last one it is.
    admissible = [trial for trial in tried if trial.admissible and trial.is_whole]
    return best_of(admissible or tried, floors=floors, aligned=aligned) if tried else None


def _failures_in_words(failed: Sequence[Failure]) -> str:
    """Return each text once, with the values at which it came."""
    by_text: dict[str, list[str]] = {}
    for failure in failed:
        by_text.setdefault(failure.text, []).append("" if failure.value is None else f"{failure.value:g}")
    parts = []
    for text, values in by_text.items():
        known = [value for value in values if value]
        parts.append(f"at {', '.join(known)}: {text}" if known else text)
    return "; ".join(parts)


def _dominator(trial: Trial, trials: Sequence[Trial], front: Sequence[int]) -> int | None:
    use, safety = _point(trial)
    better = [
        index
        for index in front
        if (found := _point(trials[index]))[0] >= use and found[1] >= safety and found != (use, safety)
    ]
    return max(better, key=lambda index: _point(trials[index])[1], default=None)


def _point(trial: Trial) -> tuple[float, float]:
    utility = trial.measured.metrics.utility
    bad = trial.measured.bad
    return (utility.value if utility is not None else -trial.change), -sum(bad.values()) / max(1, len(bad))
