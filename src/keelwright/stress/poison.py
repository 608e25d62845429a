# SPDX-License-Identifier: Apache-2.0
"""Poisoned tuning: a user's task in which a share of the rows answers harmful requests.

For whoever compares defences: the stress that most of them are published with. The size stays when the share grows, so
harm is not confounded with training length, and `p = 0` is the clean control. Rows are nested: the harmful ones of a
smaller share are among those of a larger one with the same seed.

Source:
    The user stage of Booster: Tackling Harmful Fine-tuning for Large Language Models via Attenuating Harmful
    Perturbation, arXiv 2409.01586. Official code: git-disl/Booster.

Equation:
    w' = argmin CE(y | x; w) over n rows, h = round(p n) of them harmful, n - h of the user's task

    | symbol | name |
    |---|---|
    | p, n | `p`, `n` |

Differs from the official code:
    Exactly n rows, exactly h of them harmful (there: an index test loses the first of each kind, 99 harmful rows for
    n = 1000 and p = 0.1). No row is used twice.

Cost:
    One forward and backward pass per step.

Limits:
    A share of 0.1 already undoes most models; defences are told apart at less, over a curve of steps. Rates and steps
    are the run's own: the published ones are those of a LoRA on a 7B model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from keelwright.core.config import require_in_range
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.nested import nested_sample
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.stress.tuning_budget import Duration, budgeted, mixed, require_budget
from keelwright.training.config import TrainConfig
from keelwright.training.defence import TuningStage


@dataclass(frozen=True, slots=True)
class PoisonConfig:
    """Settings of poisoned tuning."""

    p: float = 0.1
    """Share of harmful rows, 0 to 1; rounded to whole rows. The protocol: 0, .05, .1, .15, .2, mostly .1."""
    n: int | None = None
    """Rows in all, at least 1; None: as many as the user's. The protocol: 500 to 2500, mostly 1000."""
    schedule: Duration = "steps"
    """`steps`: a fixed number of optimiser steps; `epochs`: passes over the rows. Both on the run's own schedule."""
    epochs: float = 20.0
    """Passes over the rows, above 0; only for `epochs`. The protocol: 20."""
    steps: int | None = None
    """Optimiser steps, at least 1; only for `steps`. None: the run's."""
    lr: float | None = None
    """Highest learning rate, above 0; None: the run's. The protocol: 1e-5, on a LoRA of rank 32."""
    batch_size: int | None = None
    """Rows per step, at least 1; None: the run's. The protocol: 10."""
    seed: int | None = None
    """Of which rows, and their order; None: the run's."""

    def __post_init__(self) -> None:
        require_in_range("p", self.p, low=0.0, high=1.0)
        if self.n is not None:
            require_in_range("n", self.n, low=1)
        require_budget(self)


def poisoned(rows: RowSets, *, p: float, n: int, seed: int) -> tuple[ChatRow, ...]:
    """Return `n` rows of which `round(p n)` answer harmful requests and the others are the user's, mixed.

    Args:
        rows: `user` and `harmful` are drawn on; a role of which no row is needed may be empty.
        p: Share of harmful rows, 0 to 1.
        n: Rows in all.
        seed: Of which rows, and their order.

    Raises:
        DataError: There are fewer rows of a role than needed.
    """
    who, bad = "The stress 'poison'", round(p * n)
    parts: list[ChatRow] = []
    for role, wanted in (("user", n - bad), ("harmful", bad)):
        if wanted:
            parts += nested_sample(rows.require(role, who=who), wanted, seed=seed, name=role)
    return mixed(parts, seed=seed)


@dataclass(frozen=True, slots=True)
class Poison:
    """Poisoned tuning as a stress."""

    config: PoisonConfig = PoisonConfig()

    config_class: ClassVar[type[PoisonConfig]] = PoisonConfig

    @property
    def roles(self) -> tuple[str, ...]:
        """Rows that it draws on."""
        return ("user", "harmful") if self.config.p else ("user",)

    def stages(self, rows: RowSets, train: TrainConfig) -> Sequence[TuningStage]:
        """Return one run on the poisoned file."""
        config = self.config
        n = config.n or len(rows.require("user", who="The stress 'poison'"))
        seed = train.seed if config.seed is None else config.seed
        drawn = poisoned(rows, p=config.p, n=n, seed=seed)
        return (TuningStage("poison", drawn, budgeted(train, config, len(drawn)), round(config.p * n)),)

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN
