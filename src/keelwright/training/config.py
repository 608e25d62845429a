# SPDX-License-Identifier: Apache-2.0
"""Settings of the training loop, and the learning rate of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from keelwright.core.config import require_choice, require_in_range

Schedule = Literal["linear", "constant"]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How a model is trained: AdamW on the answers of chat rows."""

    steps: int = 75
    """Optimiser steps, at least 1."""
    batch_size: int = 20
    """Rows per step over all processes, at least 1."""
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
    """`constant`, or `linear`: falls to `final_lr_share` of `lr` at the last step."""
    final_lr_share: float = 0.1
    """Only for `linear`: share of `lr` left at the end, 0 to 1."""
    seed: int = 0
    """Of the order of the rows, of dropout and of new adapters."""
    lora_rank: int = 0
    """Rank of the LoRA adapter on every linear layer; 0 trains the weights themselves."""
    lora_alpha: float = 0.0
    """Scale of the adapter is alpha / rank; 0 means twice the rank."""
    checkpoint_every: int = 100
    """Steps between checkpoints, where the loop has a folder."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            require_in_range(name, getattr(self, name), low=1)
        for name in ("weight_decay", "clip", "warmup_steps", "lora_rank", "lora_alpha"):
            require_in_range(name, getattr(self, name), low=0)
        require_in_range("lr", self.lr, low=0.0, low_open=True)
        require_in_range("final_lr_share", self.final_lr_share, low=0.0, high=1.0)
        require_choice("schedule", self.schedule, ("linear", "constant"))
        for beta in self.betas:
            require_in_range("betas", beta, low=0.0, high=1.0, high_open=True)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0; a pure function, so that resuming needs no scheduler."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (1.0 - (1.0 - config.final_lr_share) * done)
