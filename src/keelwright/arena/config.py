# SPDX-License-Identifier: Apache-2.0
"""Settings that `stress`, `harden` and `tune` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keelwright.core.config import require_in_range
from keelwright.measure.audit_config import AuditConfig
from keelwright.training.config import Precision, TooLong, TrainConfig, steps_of

FULL_TUNING_BELOW = 50_000_000
"""Parameters up to which all weights are trained by default; above, a LoRA of rank 16: full tuning takes 16 bytes a
weight."""
_LORA_RANK = 16
_SMALL_LR, _FULL_LR, _LORA_LR = 1.5e-4, 2e-5, 1e-4
_EPOCHS, _BATCH, _STEPS = 3.0, 20, 75


@dataclass(frozen=True, slots=True)
class TuningConfig:
    """Settings of a run that trains and measures."""

    suite: str = "auto"
    """Suites or YAML files, joined by commas; `auto` is `workshop` for lab models, else `core`."""
    judges: tuple[str, ...] = ()
    """Judges beside those of the suite."""
    sets: str | None = None
    """Folder of the suite's data sets, or `hub`; None looks at KEELWRIGHT_DATA and the hub's cache."""
    utility: str | None = None
    """Task file, text file, or `lab:` task; None measures the workshop's own task for lab models, else none."""
    limit: int | None = None
    """At most this many items of each kind and set."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; None means what the suite asks for."""
    answers_at_once: int = 64
    """Answers generated at once, at least 1."""
    steps: int | None = None
    """Optimiser steps of the tuning; None: `epochs`."""
    epochs: float | None = None
    """Passes over the rows; None: 3."""
    lr: float | None = None
    """Highest learning rate; None: 1.5e-4 below 50 million weights, else 2e-5, with LoRA 1e-4."""
    batch_size: int | None = None
    """Rows per optimiser step, at least 1; None: 20, or what the stress's source fixes."""
    lora_rank: int | None = None
    """Rank of a LoRA adapter; 0 trains the weights; None: 0 below 50 million weights, else 16."""
    accumulate: int = 1
    """Micro-batches that a step is split into, at least 1."""
    precision: Precision = "stored"
    """`bf16`: forward passes in bfloat16."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass."""
    too_long: TooLong = "error"
    """Rows longer than the model's positions: an error, left out, or cut; counted."""
    at: tuple[int, ...] = ()
    """Steps after which the model is measured; empty: four, evenly spread, the last one included."""
    seeds: int = 1
    """Training seeds, from `seed` on; a claim about a method takes three."""
    seed: int = 0
    """Of rows, their order, new adapters, items under a limit."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    offline: bool = False
    """Never use the network."""
    allow_pickle: bool = False
    """Also open pickled weights, as tensors only."""
    harden_steps: int = 100
    """Optimiser steps of a defence of the alignment stage, at least 1."""
    harden_lr: float | None = None
    """Its learning rate; None: twice that of the tuning's default."""
    harden_batch: int = 32
    """Its rows per step, at least 1."""

    def __post_init__(self) -> None:
        for name in ("answers_at_once", "accumulate", "seeds", "harden_steps", "harden_batch"):
            require_in_range(name, getattr(self, name), low=1)
        for name in ("steps", "batch_size", "limit", "max_new_tokens"):
            if getattr(self, name) is not None:
                require_in_range(name, getattr(self, name), low=1)
        for name in ("epochs", "lr", "harden_lr"):
            if getattr(self, name) is not None:
                require_in_range(name, getattr(self, name), low=0.0, low_open=True)
        if self.lora_rank is not None:
            require_in_range("lora_rank", self.lora_rank, low=0)
        for step in self.at:
            require_in_range("at", step, low=1)

    def audit(self) -> AuditConfig:
        """Return how the model is measured."""
        return AuditConfig(
            suite=self.suite,
            judges=self.judges,
            data=self.sets,
            utility=self.utility,
            limit=self.limit,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.answers_at_once,
            # Which items a limit leaves is no matter of the training seed: runs of other seeds are compared.
            seed=0,
            device=self.device,
            offline=self.offline,
            allow_pickle=self.allow_pickle,
        )

    def tuning(self, *, parameters: int, rows: int, seed: int) -> TrainConfig:
        """Return the user's training run.

        Args:
            parameters: Of the model.
            rows: How many rows there are.
            seed: Of this run.
        """
        rank = self._rank(parameters)
        batch_size = self.batch_size or _BATCH
        counted = steps_of(self.epochs or _EPOCHS, rows, batch_size) if rows else _STEPS
        steps = self.steps or counted
        return self._train(steps, batch_size, self.lr or _default_lr(parameters, rank), rank, seed)

    def hardening(self, *, parameters: int, seed: int) -> TrainConfig:
        """Return the training run of a defence of the alignment stage."""
        rank = self._rank(parameters)
        lr = self.harden_lr or 2.0 * _default_lr(parameters, rank)
        return self._train(self.harden_steps, self.harden_batch, lr, rank, seed)

    def given(self) -> dict[str, Any]:
        """Return what was asked of the tuning itself: it wins over what a stress takes from its source."""
        found = {name: getattr(self, name) for name in ("steps", "epochs", "lr", "batch_size")}
        found = {name: value for name, value in found.items() if value is not None}
        if "steps" in found:
            return {**found, "schedule": "steps"}
        return {**found, "schedule": "epochs"} if "epochs" in found else found

    def marks(self, steps: int) -> tuple[int, ...]:
        """Return the steps after which a run of so many steps is measured, the last one included."""
        if self.at:
            return tuple(sorted({one for one in self.at if one < steps} | {steps}))
        return tuple(sorted({max(1, round(steps * quarter / 4)) for quarter in (1, 2, 3, 4)}))

    def _rank(self, parameters: int) -> int:
        if self.lora_rank is not None:
            return self.lora_rank
        return 0 if parameters < FULL_TUNING_BELOW else _LORA_RANK

    def _train(self, steps: int, batch_size: int, lr: float, rank: int, seed: int) -> TrainConfig:
        return TrainConfig(
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            accumulate=self.accumulate,
            precision=self.precision,
            gradient_checkpointing=self.gradient_checkpointing,
            too_long=self.too_long,
            lora_rank=rank,
            seed=seed,
        )


def _default_lr(parameters: int, rank: int) -> float:
    if rank:
        return _LORA_LR
    return _SMALL_LR if parameters < FULL_TUNING_BELOW else _FULL_LR
