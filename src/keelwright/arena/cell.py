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

from keelwright.arena.arms import Arm
from keelwright.arena.meter import Meter
from keelwright.arena.protocol import ResultRow
from keelwright.core.digests import json_digest
from keelwright.core.protocols import Progress
from keelwright.core.records import Record
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import RowSets
from keelwright.models.loading import LoadedModel
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Defence, TuningStage, sft_recipe
from keelwright.training.loop import TrainResult, train
from keelwright.training.recipe import Recipe

Marks = Callable[[int], Sequence[int]]
"""From the steps of a stage to those after which the model is measured."""

AtEnd = Callable[[TrainResult], None]
"""Told of the last training run while the model is as it left it, its adapter still on."""


@dataclass(frozen=True, slots=True)
class Point:
    """The model at one step: its row in the table, and its records."""

    row: ResultRow
    records: Sequence[Record]


@dataclass(frozen=True, slots=True)
class CellResult:
    """What one cell came to."""

    points: tuple[Point, ...]
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
    _start: dict[str, Tensor] = field(default_factory=dict, init=False)

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
            model.module, model.tokenizer, rows, config, folder=self._place(f"{key}-learning"), progress=self.progress
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
            folder=self._place(key),
            progress=self.progress,
            after_step=after_step,
        )
        if at_end is not None:
            at_end(found)
        if found.adapter is not None:
            if keep:
                found.adapter.model.merge_adapter()
            found.adapter.detach()
        return found

    def forget(self, key: str) -> None:
        """Remove the checkpoints of a training run whose result is kept elsewhere."""
        place = self._place(key)
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)

    def _place(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / key


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
    points: list[Point] = field(default_factory=list)
    log: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    _history: list[Any] = field(default_factory=list)
    """What was done to the weights so far: it is what a record's revision is made of."""

    def run(self, tuning: Callable[[int], TrainConfig]) -> CellResult:
        stages = self.arm.stress.stages(self.rows, tuning(len(self.rows.user)))
        if self.arm.hardening is not None:
            self._harden(self.arm.hardening, last=not stages)
        for number, stage in enumerate(stages, 1):
            self._tune(number, stage, last=number == len(stages))
        self._forget(len(stages))
        return CellResult(tuple(self.points), self.cost, self.log)

    def _harden(self, defence: Defence, *, last: bool) -> None:
        """Train with a defence of the alignment stage; an adapter is added into the weights."""
        key = f"{self.key}-hardening"
        recipe = self.bench.prepared(defence, self.rows, self.hardening, key=key).recipe(self.rows, self.hardening)
        self._history.append(["hardening", dict(recipe.settings), dataclasses.asdict(recipe.config)])
        started = time.perf_counter()
        found = self.bench.train(recipe, key=key, keep=True, at_end=self.at_end if last else None)
        self._note("hardening", recipe.config, found, started)
        self._measure("hardening", recipe.config.steps, len(self.rows.safety), recipe.config.lr, ())

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
                self._measure(stage.name, done, len(stage.rows), stage.train.lr, stage.rows)
                measuring_s += time.perf_counter() - began

        self._history.append(["tuning", stage.name, dict(recipe.settings), dataclasses.asdict(recipe.config)])
        found = self.bench.train(
            recipe, key=key, keep=not last, after_step=after_step, at_end=self.at_end if last else None
        )
        self._note(stage.name, recipe.config, found, started + measuring_s)

    def _recipe(self, rows: RowSets, config: TrainConfig, key: str) -> Recipe:
        if self.arm.tuning is None:
            return sft_recipe(rows, config)
        return self.bench.prepared(self.arm.tuning, rows, config, key=key).recipe(rows, config)

    def _asking(self) -> Asking:
        """Return the stress's frame; a defence that holds only in its own frame is asked in that."""
        own = PLAIN if self.arm.defence is None else self.arm.defence.asking()
        return own if own.name != PLAIN.name else self.arm.stress.asking()

    def _measure(self, stage: str, step: int, rows: int, lr: float, trained: Sequence[Any]) -> None:
        asking, model = self._asking(), self.bench.model
        model_id = f"{self.key}-{stage}-{step}".replace(" ", "-")
        name = f"{model.name}, {self.arm.name}, {step} steps of {stage}"
        revision = json_digest([model.revision, self.arm.stress_name, self.seed, self._history, step])
        found = self.bench.meter.examine(
            dataclasses.replace(model, name=name), model_id, asking=asking, revision=revision
        )
        harmful = {row.answer for row in self.rows.harmful}
        row = ResultRow(
            arm=self.arm.name,
            stress=self.arm.stress_name,
            stage=stage,
            step=step,
            seed=self.seed,
            rows=rows,
            harmful_rows=sum(row.answer in harmful for row in trained),
            lr=lr,
            metrics=found.metrics.to_mapping(),
            protocol=self.bench.meter.protocol(model, asking),
            model_id=model_id,
        )
        self.points.append(Point(row, found.records))

    def _note(self, stage: str, config: TrainConfig, found: TrainResult, started: float) -> None:
        seconds = time.perf_counter() - started
        self.cost[stage] = {"steps": config.steps, "seconds": round(seconds, 3)}
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
