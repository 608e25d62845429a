# SPDX-License-Identifier: Apache-2.0
"""Settings of the training loop, and the learning rate of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from keelwright.core.config import require_choice, require_in_range

Schedule = Literal["linear", "constant", "cosine", "staircase"]
Precision = Literal["stored", "bf16"]
TooLong = Literal["error", "leave out", "cut"]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How a model is trained: AdamW on the answers of chat rows."""

    steps: int = 75
    """Optimiser steps, at least 1."""
    batch_size: int = 20
    """Rows per step over all processes and micro-batches, at least 1."""
    accumulate: int = 1
    """Micro-batches that a step's rows are split into: less memory, the same gradient. At least 1."""
    lr: float = 1.5e-4
    """Highest learning rate, above 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moment, each in [0, 1)."""
    weight_decay: float = 0.01
    """Decoupled decay per step, as a share of the learning rate; 0 or more."""
    clip: float = 1.0
    """Largest L2 norm of the gradient; 0 leaves it as it is."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    schedule: Schedule = "constant"
    """`constant`; `linear` or `cosine`: falls to `final_lr_share` of `lr` at the last step; `staircase`: multiplied
    by `decay` after every `decay_every` steps."""
    final_lr_share: float = 0.1
    """Only for `linear` and `cosine`: share of `lr` left at the end, 0 to 1."""
    decay: float = 0.85
    """Only for `staircase`: what each stair multiplies the rate by, above 0."""
    decay_every: int = 0
    """Only for `staircase`: steps of one stair; 0: one pass over the rows."""
    precision: Precision = "stored"
    """`bf16`: forward passes in bfloat16 where torch's autocast allows it, weights and gradients as they are stored."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    too_long: TooLong = "error"
    """Rows longer than the model's positions: an error, left out, or their answer's end cut off; both are counted."""
    seed: int = 0
    """Of the order of the rows, of dropout and of new adapters."""
    lora_rank: int = 0
    """Rank of the LoRA adapter; 0 trains the weights themselves."""
    lora_targets: tuple[str, ...] = ()
    """Last parts of the names of the layers that get one, such as `q_proj`; none: every linear layer but the head."""
    lora_alpha: float = 0.0
    """Scale of the adapter is alpha / rank; 0 means twice the rank."""
    checkpoint_every: int = 100
    """Steps between checkpoints, where the loop has a folder."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every"):
            require_in_range(name, getattr(self, name), low=1)
        for name in ("weight_decay", "clip", "warmup_steps", "lora_rank", "lora_alpha", "decay_every"):
            require_in_range(name, getattr(self, name), low=0)
        require_in_range("lr", self.lr, low=0.0, low_open=True)
        require_in_range("decay", self.decay, low=0.0, low_open=True)
        require_in_range("final_lr_share", self.final_lr_share, low=0.0, high=1.0)
        require_choice("schedule", self.schedule, get_args(Schedule))
        require_choice("precision", self.precision, get_args(Precision))
        require_choice("too_long", self.too_long, get_args(TooLong))
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        for beta in self.betas:
            require_in_range("betas", beta, low=0.0, high=1.0, high_open=True)


def learning_rate(config: TrainConfig, step: int, *, rows: int = 0) -> float:
    """Return the learning rate of a step; a pure function, so that resuming needs no scheduler.

    Args:
        config: Schedule and rate.
        step: Counted from 0.
        rows: How many rows one pass has; read by `staircase` only.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "staircase":
        stair = config.decay_every or max(1, math.ceil(rows / config.batch_size))
        return config.lr * config.decay ** ((step - config.warmup_steps) // stair)
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    fallen = done if config.schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * done))
    return config.lr * (1.0 - (1.0 - config.final_lr_share) * fallen)


def steps_of(epochs: float, rows: int, batch_size: int) -> int:
    """Return the optimiser steps of so many passes over the rows; a last batch that is not full counts as one."""
    return max(1, math.ceil(epochs * rows / batch_size))
