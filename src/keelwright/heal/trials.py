# SPDX-License-Identifier: Apache-2.0
"""Trials on the live model: nothing is written, and the tuned weights come back bit for bit.

`halving.py` says in which rounds many methods are raced. A method that cannot be prepared or applied is out with its
error's text; the others go on. Only where nothing could be tried at all is the first error raised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from keelwright.core.errors import ConfigError, DataError, KeelwrightError, ModelMismatchError, NumericalError
from keelwright.core.protocols import Progress, TensorSource
from keelwright.heal.bench import Bench
from keelwright.heal.candidates import Candidate
from keelwright.heal.decide import Floors, Measured, Trial, TrialPart, check_limits, choose, is_worse
from keelwright.heal.halving import FULL_RACE, PART_WORDS, RUNGS, keep_better, survivors
from keelwright.heal.search import Tried, next_coefficient
from keelwright.models.loading import LoadedModel
from keelwright.weights.live import LiveTrial

NOT_APPLICABLE = (ConfigError, DataError, ModelMismatchError, NumericalError)
"""Errors that say that a method does not suit these models or rows; what the machine lacks stops the run instead."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A method that could not be tried, at one value of its setting or at all."""

    method: str
    value: float | None
    """None: it could not be prepared."""
    error: KeelwrightError

    @property
    def text(self) -> str:
        """What went wrong, in one line."""
        found = f" Found {self.error.found}." if self.error.found else ""
        return f"{self.error.problem}{found}"


@dataclass
class Race:
    """What a race came to."""

    trials: list[Trial] = field(default_factory=list)
    """Each setting that was tried, on the most items it was asked, by method."""
    failures: list[Failure] = field(default_factory=list)
    dropped: dict[str, TrialPart] = field(default_factory=dict)
    """By method: after which round it was left behind."""


@dataclass
class Trials:
    """The rules by which to try."""

    bench: Bench
    floors: Floors
    has_utility: bool
    refinements: int
    progress: Progress

    def run(
        self,
        candidates: Sequence[Candidate],
        sources: Mapping[str, TensorSource],
        model: LoadedModel,
        *,
        failures: Sequence[Failure] = (),
    ) -> Race:
        """Race the candidates, and leave the model as it was.

        Args:
            candidates: The methods, in order; prepared, where they need it.
            sources: Tensors by role.
            model: The tuned model, live; edited in place and restored before this returns.
            failures: Methods that could not be prepared.

        Raises:
            KeelwrightError: Nothing could be tried at all; the first failure says why.
        """
        race, found = Race(failures=list(failures)), dict[str, list[Trial]]()
        with LiveTrial(model.module, sources) as live:
            left = list(candidates)
            for rung in RUNGS:
                if len(left) <= FULL_RACE:
                    break
                self.progress.note(f"round of {len(left)} methods on {PART_WORDS[rung]}")
                tried = {one.method: self.try_grid(one, live, model, rung, race) for one in left}
                tried = {method: trials for method, trials in tried.items() if trials}
                found |= tried
                left = self._next_round(left, tried, rung, race)
            for candidate in left:
                found[candidate.method] = self.search(candidate, live, model, race)
        race.trials = [trial for one in candidates for trial in found.get(one.method, ())]
        if not race.trials and race.failures:
            raise race.failures[0].error
        return race

    def search(self, candidate: Candidate, live: LiveTrial, model: LoadedModel, race: Race) -> list[Trial]:
        """Try one method over its grid and then narrow down, on the whole selection half.

        Args:
            candidate: The method.
            live: The live model.
            model: The same, as it is asked.
            race: Takes the failures.
        """
        done: list[Trial] = []
        failed: set[float] = set()
        for _ in range(len(candidate.space.grid) + self.refinements):
            value = next_coefficient(candidate.space, self._tried(done), out=failed)
            if value is None:
                break
            trial = self._try(candidate, value, live, model, "selection", race)
            if trial is None:
                failed.add(value)
            else:
                done.append(trial)
        return done

    def try_grid(
        self, candidate: Candidate, live: LiveTrial, model: LoadedModel, part: TrialPart, race: Race
    ) -> list[Trial]:
        """Try one method over its grid, on a part of the selection half."""
        tried = (self._try(candidate, value, live, model, part, race) for value in candidate.space.grid)
        return [trial for trial in tried if trial is not None]

    def _next_round(
        self, left: Sequence[Candidate], tried: Mapping[str, Sequence[Trial]], rung: TrialPart, race: Race
    ) -> list[Candidate]:
        aligned = None if self.has_utility else self.bench.measured("aligned", rung)
        kept = keep_better(tried, survivors(len(left)), floors=self.floors, aligned=aligned)
        behind = [method for method in tried if method not in kept]
        race.dropped |= dict.fromkeys(behind, rung)
        if behind:
            self.progress.note(f"left behind: {', '.join(behind)}")
        return [one for one in left if one.method in kept]

    def _try(
        self,
        candidate: Candidate,
        value: float,
        live: LiveTrial,
        model: LoadedModel,
        part: TrialPart,
        race: Race,
    ) -> Trial | None:
        name = trial_name(candidate.method, candidate.space.setting, value)
        try:
            change = live.apply(candidate.build(value))
        except NOT_APPLICABLE as error:
            self._note(Failure(candidate.method, value, error), name, race)
            return None
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            numerical = NumericalError(
                f"A decomposition of '{candidate.method}' did not converge.",
                expected="matrices that can be decomposed",
                found=str(error),
                fix=f"leave '{candidate.method}' out of --methods",
            )
            self._note(Failure(candidate.method, value, numerical), name, race)
            return None
        measured = self.bench.measure(name, part, lambda: model)
        checks = check_limits(
            measured.metrics,
            aligned=self.bench.measured("aligned", part).metrics,
            tuned=self.bench.measured("tuned", part).metrics,
            floors=self.floors,
        )
        trial = Trial(
            candidate.method,
            value,
            measured,
            change.relative_norm,
            checks,
            candidate.space.setting,
            part,
            len(self.bench.exam.items(part)),
        )
        refused = f"; not admissible: {trial.reason}" if trial.reason else ""
        self.progress.result(f"{name}: {self.bench.in_words(measured)}{refused}")
        return trial

    def _note(self, failure: Failure, name: str, race: Race) -> None:
        # A later round meets the same failure again: it is told once.
        if all((one.method, one.value) != (failure.method, failure.value) for one in race.failures):
            race.failures.append(failure)
            self.progress.note(f"{name} failed: {failure.text}")

    def _tried(self, trials: Sequence[Trial]) -> list[Tried]:
        aligned: Measured = self.bench.measured("aligned", "selection")
        best = choose(trials, aligned=aligned, floors=self.floors, has_utility=self.has_utility)
        return [
            Tried(
                coefficient=trial.coefficient,
                is_best=trial is best,
                is_restored=not is_worse(trial.measured, aligned, self.floors),
                shortfall=trial.shortfall,
            )
            for trial in trials
        ]


def trial_name(method: str, setting: str, value: float) -> str:
    """Return the model id under which a trial's records are kept."""
    return f"{method} {setting}={value:g}"
