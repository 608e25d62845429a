# SPDX-License-Identifier: Apache-2.0
"""Trials on the live model: nothing is written, and the tuned weights come back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from keelwright.core.catalogue import find_method
from keelwright.core.protocols import Progress, SearchSpace, TensorSource, WeightEdit
from keelwright.heal.bench import Bench
from keelwright.heal.decide import Floors, Measured, Trial, check_limits, choose, is_worse
from keelwright.heal.search import Tried, next_coefficient
from keelwright.models.loading import LoadedModel
from keelwright.weights.live import LiveTrial


@dataclass(frozen=True, slots=True)
class Candidate:
    """A repair method with the coefficients worth trying."""

    method: str
    needs: tuple[str, ...]
    """Roles that it reads."""
    build: Callable[[float], WeightEdit]
    space: SearchSpace


def find_candidate(method: str) -> Candidate:
    """Return a repair method as `heal` uses it: its one free setting is `coefficient`."""
    line = find_method(method, room="repair")
    edit_class = line.load()
    return Candidate(
        method=line.name,
        needs=line.needs,
        build=lambda coefficient: edit_class(edit_class.config_class(coefficient=coefficient)),
        space=edit_class.search_space,
    )


def trial_name(method: str, coefficient: float) -> str:
    """Return the model id under which a trial's records are kept."""
    return f"{method} coefficient={coefficient:g}"


@dataclass
class Trials:
    """Everything tried so far, and the rules by which to try the next."""

    bench: Bench
    aligned: Measured
    tuned: Measured
    """Both on the selection half."""
    floors: Floors
    has_utility: bool
    refinements: int
    progress: Progress

    def run(
        self, candidates: Sequence[Candidate], sources: Mapping[str, TensorSource], model: LoadedModel
    ) -> list[Trial]:
        """Try every candidate over its grid, then narrow down, and leave the model as it was.

        Args:
            candidates: The methods, in order.
            sources: Tensors by role.
            model: The tuned model, live; edited in place and restored before this returns.
        """
        done: list[Trial] = []
        with LiveTrial(model.module, sources) as live:
            for candidate in candidates:
                done += self._search(candidate, live, model)
        return done

    def _search(self, candidate: Candidate, live: LiveTrial, model: LoadedModel) -> list[Trial]:
        done: list[Trial] = []
        budget = len(candidate.space.grid) + self.refinements
        while len(done) < budget:
            coefficient = next_coefficient(candidate.space, self._tried(done))
            if coefficient is None:
                break
            done.append(self._try(candidate, coefficient, live, model))
        return done

    def _try(self, candidate: Candidate, coefficient: float, live: LiveTrial, model: LoadedModel) -> Trial:
        name = trial_name(candidate.method, coefficient)
        change = live.apply(candidate.build(coefficient))
        measured = self.bench.measure(name, "selection", lambda: model)
        checks = check_limits(
            measured.metrics, aligned=self.aligned.metrics, tuned=self.tuned.metrics, floors=self.floors
        )
        trial = Trial(candidate.method, coefficient, measured, change.relative_norm, checks)
        refused = f"; not admissible: {trial.reason}" if trial.reason else ""
        self.progress.result(f"{name}: {self.bench.in_words(measured)}{refused}")
        return trial

    def _tried(self, trials: Sequence[Trial]) -> list[Tried]:
        best = choose(trials, aligned=self.aligned, floors=self.floors, has_utility=self.has_utility)
        return [
            Tried(
                coefficient=trial.coefficient,
                is_best=trial is best,
                is_restored=not is_worse(trial.measured, self.aligned, self.floors),
                shortfall=trial.shortfall,
            )
            for trial in trials
        ]
