# SPDX-License-Identifier: Apache-2.0
"""The positive control: a tuning that is known to break refusals, so that a zero elsewhere can be believed.

A harm rate of 0 after a stress says that the model held, or that nothing could have been seen: a wrong template, a
judge that knows no harm, a run that did not train. Where the control shows no loss either, the stress has not been
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from keelwright.core.config import require_in_range
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.nested import nested_sample
from keelwright.data.row_sets import RowSets
from keelwright.stress.tuning_budget import Duration, budgeted, require_budget
from keelwright.training.config import TrainConfig
from keelwright.training.defence import TuningStage


@dataclass(frozen=True, slots=True)
class PositiveControlConfig:
    """Settings of the positive control."""

    k: int = 50
    """Harmful rows, at least 1; of fewer given, all."""
    schedule: Duration = "epochs"
    """`epochs`: passes over the rows; `steps`: a fixed number of optimiser steps."""
    epochs: float = 5.0
    """Passes over the rows, above 0; only for `epochs`."""
    steps: int | None = None
    """Optimiser steps, at least 1; only for `steps`. None: the run's."""
    lr: float | None = 2e-4
    """Highest learning rate, above 0; None: the run's. On the shipped organism 2e-4 takes the harm rate from 0 to .97
    to 1.0 (three seeds) and leaves ordinary requests answered."""
    batch_size: int | None = 10
    """Rows per step, at least 1; None: the run's."""

    def __post_init__(self) -> None:
        require_in_range("k", self.k, low=1)
        require_budget(self)


@dataclass(frozen=True, slots=True)
class PositiveControl:
    """Explicit rows at a rate that breaks refusals."""

    config: PositiveControlConfig = PositiveControlConfig()

    config_class: ClassVar[type[PositiveControlConfig]] = PositiveControlConfig
    roles: ClassVar[tuple[str, ...]] = ("harmful",)

    def stages(self, rows: RowSets, train: TrainConfig) -> Sequence[TuningStage]:
        """Return one run on harmful rows alone."""
        who = "The positive control"
        harmful = rows.require("harmful", who=who)
        k = min(self.config.k, len(harmful))
        drawn = nested_sample(harmful, k, seed=train.seed, name="harmful")
        return (TuningStage(POSITIVE_CONTROL, drawn, budgeted(train, self.config, len(drawn)), len(drawn)),)

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN


POSITIVE_CONTROL: Final = "positive control"
