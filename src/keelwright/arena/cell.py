# SPDX-License-Identifier: Apache-2.0
"""One cell: a model, hardened or not, under a stress, with or without a defence in it, measured over the steps."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keelwright.arena.arms import PLAINLY, Arm, public_settings
from keelwright.arena.meter import Meter
from keelwright.arena.protocol import ResultRow
from keelwright.core.catalogue import catalogue
from keelwright.core.digests import json_digest
from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Progress
from keelwright.data.asking import PLAIN, Asking, nested
from keelwright.data.row_sets import RowSets
from keelwright.judges.screening.ensemble import Ensemble
from keelwright.judges.screening.guard import GuardModel
from keelwright.judges.screening.screen import Screen
from keelwright.models.loading import LoadedModel
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Defence, Stress, TuningStage, sft_recipe
from keelwright.training.loop import TrainResult, train
from keelwright.training.recipe import Recipe

Marks = Callable[[int], Sequence[int]]
"""From the steps of a stage to those after which the model is measured."""

AtEnd = Callable[[TrainResult], None]
"""Told of the last training run while the model is as it left it, its adapter still on."""


@dataclass(frozen=True, slots=True)
class CellResult:
    """What one cell came to."""

    rows: tuple[Mapping[str, Any], ...]
    """Of the table, in the order of the steps."""
    cost: Mapping[str, Any]
    """Steps and seconds of hardening and tuning, measuring left out."""
    log: Mapping[str, Any]
    """Losses and figures of the training steps, by stage."""


@dataclass
class Workbench:
    """A live model that cells train and give back as it was.

    Weights that are trained in full are float32; with LoRA they stay as they are stored.
    """

    model: LoadedModel
    meter: Meter
    progress: Progress
    folder: Path | None = None
    """Where training checkpoints go."""
    remember: Callable[[str, Any], None] = lambda name, value: None
    """Keeps a small value for a run that is cut off."""
    recall: Callable[[str], Any] = lambda name: None
    """Returns what was kept under a name, or None."""
    guards: Callable[[], Sequence[GuardModel]] = tuple
    """Opens the guards that screen rows, when they are first needed."""
    _start: dict[str, Tensor] = field(default_factory=dict, init=False)
    _guards: Sequence[GuardModel] | None = field(default=None, init=False)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Give every weight back, bit for bit, at the end."""
        module = self.model.module
        if not self._start:
            self._start = {name: one.detach().clone() for name, one in module.state_dict().items()}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, one in module.state_dict().items():
                    one.copy_(self._start[name])

    def prepared(self, defence: Defence, rows: RowSets, config: TrainConfig, *, key: str) -> Defence:
        """Return the defence with what it learns before it can train, where it learns anything."""
        if not hasattr(defence, "prepare"):
            return defence
        model = self.model
        ready: Defence = defence.prepare(
            model.module, model.tokenizer, rows, config, folder=self.place(f"{key}-learning"), progress=self.progress
        )
        return ready

    def train(
        self,
        recipe: Recipe,
        *,
        key: str,
        keep: bool,
        after_step: Callable[[int, PreTrainedModel], None] | None = None,
        at_end: AtEnd | None = None,
    ) -> TrainResult:
        """Train the live model.

        Args:
            recipe: What to train.
            key: Of its checkpoints.
            keep: Add a new adapter into the weights at the end; else it is taken off.
            after_step: Told of each step.
            at_end: Told of the result, before an adapter is taken off.
        """
        model = self.model
        found = train(
            model.module,
            model.tokenizer,
            recipe,
            folder=self.place(key),
            progress=self.progress,
            after_step=after_step,
        )
        try:
            if at_end is not None:
                at_end(found)
            if found.adapter is not None and keep:
                found.adapter.model.merge_adapter()
        finally:
            if found.adapter is not None:
                found.adapter.detach()
        return found

    def forget(self, key: str) -> None:
        """Remove the checkpoints of a training run whose result is kept elsewhere."""
        place = self.place(key)
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)

    def place(self, key: str) -> Path | None:
        """Return where something unfinished is kept, under a name of its own."""
        return None if self.folder is None else self.folder / key

    def guard(self) -> GuardModel:
        """Return the guard that rows are written against: the first one.

        Raises:
            ConfigError: There is none.
        """
        guards = self._opened()
        if not guards:
            raise ConfigError(
                "This stress writes rows against a guard, and none was given.",
                expected="--guard REF: a guard model of yours that shares the model's vocabulary",
                found="none",
                fix="give the guard that screens your tuning service's data",
            )
        return guards[0]

    def screen(self) -> Screen | None:
        """Return what screens the rows: all guards together, where there are several."""
        guards = self._opened()
        return Ensemble(guards) if len(guards) > 1 else None

    def _opened(self) -> Sequence[GuardModel]:
        if self._guards is None:
            self._guards = self.guards()
        return self._guards


def run_cell(
    bench: Workbench,
    arm: Arm,
    rows: RowSets,
    *,
    seed: int,
    tuning: Callable[[int], TrainConfig],
    hardening: TrainConfig,
    marks: Marks,
    at_end: AtEnd | None = None,
) -> CellResult:
    """Return what becomes of the model in one arm, for one seed; the model is given back as it was.

    Args:
        bench: The live model and its meter.
        arm: The stress, and the defence.
        rows: By role, for this seed.
        seed: Of the training.
        tuning: From the number of rows to the stress's training run, as the command line asked for it.
        hardening: The training run of a defence of the alignment stage.
        marks: When to measure.
        at_end: Told of the last training run, to keep its model.
    """
    key = f"{arm.stress_name}-{arm.name}-{seed}".replace(" ", "-").replace("/", "-")
    with bench.restored():
        return _Cell(bench, arm, rows, seed, key, hardening, marks, at_end).run(tuning)


@dataclass
class _Cell:
    bench: Workbench
    arm: Arm
    rows: RowSets
    seed: int
    key: str
    hardening: TrainConfig
    marks: Marks
    at_end: AtEnd | None
    conditions: str = field(default="", init=False)
    """Digest of model, stress and tuning: what arms share that may be compared."""
    settings: str = field(default="", init=False)
    """Digest of the defence and of how it was trained."""
    rows_by_id: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """By model id; those that a cut run had measured are there from the start."""
    log: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    _history: list[Any] = field(default_factory=list)
    """What was done to the weights so far: it is what a record's revision is made of."""

    def run(self, tuning: Callable[[int], TrainConfig]) -> CellResult:
        stress: Any = self.arm.stress
        self.rows_by_id.update(self.bench.recall(f"rows of {self.key}") or {})
        train = tuning(len(self.rows.user))
        self._digest(train)
        only_hardens = not (hasattr(stress, "applied") or hasattr(stress, "prepare") or stress.stages(self.rows, train))
        if self.arm.hardening is not None:
            self._harden(self.arm.hardening, last=only_hardens)
        if hasattr(stress, "applied"):
            self._edit(stress)
            return CellResult(tuple(self.rows_by_id.values()), self.cost, self.log)
        if hasattr(stress, "prepare"):
            stress = self._searched(stress, train)
        stages = stress.stages(self.rows, train)
        for number, stage in enumerate(stages, 1):
            self._tune(number, stage, last=number == len(stages))
        self._forget(len(stages))
        return CellResult(tuple(self.rows_by_id.values()), self.cost, self.log)

    def _digest(self, train: TrainConfig) -> None:
        arm = self.arm
        told = [self.bench.model.revision, arm.stress_name, public_settings(arm.stress.config), _seedless(train)]
        self.conditions = json_digest(told)
        own = None if arm.defence is None else public_settings(arm.defence.config)
        hardening = _seedless(self.hardening) if arm.hardening is not None else None
        self.settings = json_digest([arm.name, own, hardening])

    def _edit(self, stress: Any) -> None:
        """Measure the model while a stress of the weights is applied to it."""
        bench, started = self.bench, time.perf_counter()
        with stress.applied(bench.model.module, bench.model.tokenizer, self.rows) as found:
            name = self.arm.stress_name
            self.cost[name] = {"steps": 0, "seconds": round(time.perf_counter() - started, 3)}
            self._history.append(["edit", name, dataclasses.asdict(stress.config)])
            self._measure(name, 0, 0, None, 0)
            self.log[name] = {"found": found.to_mapping()}

    def _searched(self, stress: Any, train: TrainConfig) -> Stress:
        """Return a stress whose rows had to be searched against the live model and the guard."""
        bench, arm = self.bench, self.arm
        started = time.perf_counter()
        # Arms that start from the same weights share the search.
        key = f"{arm.stress_name}-{arm.name if arm.hardening is not None else 'start'}-{self.seed}-search"
        ready = stress.prepare(
            bench.model.module,
            bench.model.tokenizer,
            self.rows,
            train,
            guard=bench.guard(),
            screen=bench.screen(),
            folder=bench.place(key.replace(" ", "-")),
            progress=bench.progress,
        )
        self.cost["search"] = {"steps": 0, "seconds": round(time.perf_counter() - started, 3)}
        self.log["search"] = {"report": ready.report.to_mapping()}
        found: Stress = ready
        return found

    def _harden(self, defence: Defence, *, last: bool) -> None:
        """Train with a defence of the alignment stage; an adapter is added into the weights."""
        key = f"{self.key}-hardening"
        recipe = self.bench.prepared(defence, self.rows, self.hardening, key=key).recipe(self.rows, self.hardening)
        self._history.append(["hardening", dict(recipe.settings), dataclasses.asdict(recipe.config)])
        started = time.perf_counter()
        found = self.bench.train(recipe, key=key, keep=True, at_end=self.at_end if last else None)
        self._note("hardening", recipe.config, found, started, passes=_passes(self.arm.name))
        feeds = {name: len(feed.rows) for name, feed in recipe.feeds.items()}
        self._measure("hardening", recipe.config.steps, sum(feeds.values()), recipe.config.lr, feeds.get("harmful", 0))

    def _tune(self, number: int, stage: TuningStage, *, last: bool) -> None:
        rows = dataclasses.replace(self.rows, user=stage.rows)
        key = f"{self.key}-{number}"
        recipe = self._recipe(rows, stage.train, key)
        marks = set(self.marks(recipe.config.steps))
        started, measuring_s = time.perf_counter(), 0.0

        def after_step(done: int, module: PreTrainedModel) -> None:
            nonlocal measuring_s
            if done in marks:
                began = time.perf_counter()
                self._measure(stage.name, done, len(stage.rows), stage.train.lr, stage.harmful)
                if last and done == recipe.config.steps and self._asking().name != PLAIN.name:
                    self._measure(stage.name, done, len(stage.rows), stage.train.lr, stage.harmful, plainly=True)
                measuring_s += time.perf_counter() - began

        self._history.append(["tuning", stage.name, dict(recipe.settings), dataclasses.asdict(recipe.config)])
        found = self.bench.train(
            recipe, key=key, keep=not last, after_step=after_step, at_end=self.at_end if last else None
        )
        passes = 1.0 if self.arm.tuning is None else _passes(self.arm.name)
        self._note(stage.name, recipe.config, found, started + measuring_s, passes=passes)

    def _recipe(self, rows: RowSets, config: TrainConfig, key: str) -> Recipe:
        if self.arm.tuning is None:
            return sft_recipe(rows, config)
        return self.bench.prepared(self.arm.tuning, rows, config, key=key).recipe(rows, config)

    def _asking(self) -> Asking:
        """Return the stress's frame, within the frame that the defence needs: the attack is asked either way."""
        own = PLAIN if self.arm.defence is None else self.arm.defence.asking()
        return nested(own, self.arm.stress.asking())

    def _measure(
        self, stage: str, step: int, rows: int, lr: float | None, harmful: int | None, *, plainly: bool = False
    ) -> None:
        """Measure the live model; without the frame that it is tested in where `plainly` says so."""
        asking, model = PLAIN if plainly else self._asking(), self.bench.model
        model_id = f"{self.key}-{stage}-{step}{'-plainly' if plainly else ''}".replace(" ", "-")
        name = f"{model.name}, {self.arm.name}, {step} steps of {stage}"
        revision = json_digest([model.revision, self.arm.stress_name, self.seed, self._history, step])
        found = self.bench.meter.examine(
            dataclasses.replace(model, name=name), model_id, asking=asking, revision=revision
        )
        row = ResultRow(
            arm=f"{self.arm.name}{PLAINLY}" if plainly else self.arm.name,
            stress=self.arm.stress_name,
            stage=stage,
            step=step,
            seed=self.seed,
            rows=rows,
            harmful_rows=harmful,
            lr=lr,
            metrics=found.metrics.to_mapping(),
            protocol=self.bench.meter.protocol(model, asking),
            model_id=model_id,
            label=self.arm.label or self.arm.name,
            conditions=self.conditions,
            settings=self.settings,
        )
        self.rows_by_id[model_id] = row.to_mapping()
        self.bench.remember(f"rows of {self.key}", self.rows_by_id)

    def _note(self, stage: str, config: TrainConfig, found: TrainResult, started: float, *, passes: float) -> None:
        seconds = time.perf_counter() - started
        self.cost[stage] = {
            "steps": config.steps,
            "seconds": round(seconds, 3),
            # A run that was cut off has the seconds of its last process alone, and the steps of that.
            "seconds_per_step": round(seconds / max(1, config.steps - found.resumed), 4),
            "passes_per_step": passes,
        }
        names = dict.fromkeys(name for figures in found.log for name in figures)
        self.log[stage] = {
            "losses": list(found.losses),
            "figures": {name: [figures.get(name) for figures in found.log] for name in names},
            "rows_left_out": {name: one.left_out for name, one in found.fitted.items() if one.left_out},
            "answers_cut": {name: one.cut for name, one in found.fitted.items() if one.cut},
        }

    def _forget(self, stages: int) -> None:
        for number in range(1, stages + 1):
            self.bench.forget(f"{self.key}-{number}")
            self.bench.forget(f"{self.key}-{number}-learning")
        for part in ("hardening", "hardening-learning"):
            self.bench.forget(f"{self.key}-{part}")


def _passes(name: str) -> float:
    """Return a method's forward and backward passes per step; those of plain training for what is no method."""
    line = catalogue().get(name)
    return 1.0 if line is None else line.passes_per_step


def _seedless(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of a training run that are the same for every seed."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "seed"}
