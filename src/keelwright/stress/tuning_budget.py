# SPDX-License-Identifier: Apache-2.0
"""What the stresses by tuning share: how long and how fast rows are learnt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Protocol, get_args

import torch

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.seeds import generator
from keelwright.data.rows import ChatRow
from keelwright.training.config import TrainConfig, steps_of

Duration = Literal["epochs", "steps"]
"""epochs: so many passes over the rows, however many those are; steps: a fixed number of optimiser steps."""

EPOCH_DECAY = 0.85
"""What the rate is multiplied by after each epoch in the code of Qi et al. (arXiv 2310.03693)."""


class Budget(Protocol):
    """Settings that say how long a stress tunes; None takes the run's own value."""

    @property
    def schedule(self) -> Duration:
        """By what the length is counted."""

    @property
    def epochs(self) -> float:
        """Passes over the rows."""

    @property
    def steps(self) -> int | None:
        """Optimiser steps."""

    @property
    def lr(self) -> float | None:
        """Highest learning rate."""

    @property
    def batch_size(self) -> int | None:
        """Rows per step."""


def require_budget(config: Budget) -> None:
    """Raise `ConfigError` unless the settings of length and rate can be used."""
    require_choice("schedule", config.schedule, get_args(Duration))
    require_in_range("epochs", config.epochs, low=0.0, low_open=True)
    for name, value in (("steps", config.steps), ("batch_size", config.batch_size)):
        if value is not None:
            require_in_range(name, value, low=1)
    if config.lr is not None:
        require_in_range("lr", config.lr, low=0.0, low_open=True)


def budgeted(train: TrainConfig, config: Budget, rows: int, *, stairs: bool = False) -> TrainConfig:
    """Return the run's settings with what the stress fixes.

    A batch is never larger than the rows: with fewer rows than a batch, an epoch is one step on all of them.

    Args:
        train: What the user asked for.
        config: The stress's own; None takes the user's.
        rows: How many rows are tuned on.
        stairs: Whether a run counted in epochs has no warm-up and a rate that falls by `EPOCH_DECAY` after each epoch,
            as in the code of Qi et al.; otherwise the user's schedule stays.
    """
    batch_size = min(config.batch_size or train.batch_size, rows)
    fixed = replace(
        train,
        batch_size=batch_size,
        accumulate=min(train.accumulate, batch_size),
        lr=config.lr or train.lr,
        steps=config.steps or train.steps,
    )
    if config.schedule == "steps":
        return fixed
    fixed = replace(fixed, steps=steps_of(config.epochs, rows, batch_size))
    if not stairs:
        return fixed
    # The stair is fixed here: a defence that adds rows would lengthen the one that the loop computes.
    every = math.ceil(rows / batch_size)
    return replace(fixed, schedule="staircase", decay=EPOCH_DECAY, decay_every=every, warmup_steps=0)


def mixed(rows: Sequence[ChatRow], *, seed: int) -> tuple[ChatRow, ...]:
    """Return the same rows in an order that the seed decides."""
    order: list[int] = torch.randperm(len(rows), generator=generator(seed, "stress", "mix")).tolist()
    return tuple(rows[place] for place in order)
