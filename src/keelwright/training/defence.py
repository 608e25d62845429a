# SPDX-License-Identifier: Apache-2.0
"""What the rooms `harden` and `stress` offer: a defence makes a training run of rows, a stress makes rows to tune on.

The two meet in `RowSets.user`: a stress's rows take the user's place, and a defence of the tuning stage trains on them
as on any other user's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.training.config import TrainConfig
from keelwright.training.recipe import Recipe, plain_recipe

Stage = Literal["alignment", "tuning"]
"""alignment: before the model is handed to others; tuning: within the user's run."""


class Defence(Protocol):
    """A method that keeps safety through tuning."""

    @property
    def config(self) -> Any:
        """Its settings, a frozen dataclass."""

    config_class: ClassVar[type]
    stage: ClassVar[Stage]
    roles: ClassVar[tuple[str, ...]]
    """Rows that it needs, beside the user's in the tuning stage.

    A method that holds more than plain fine-tuning says so as `copies: ClassVar[Copies]` (see `training.memory`).
    """

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the training run.

        Args:
            rows: By role.
            train: Steps, rates and seeds: the user's own in the tuning stage.

        Raises:
            DataError: Rows that it needs are not there.
        """

    def asking(self) -> Asking:
        """Return how the trained model must be asked for the defence to hold; `PLAIN` for most."""


@dataclass(frozen=True, slots=True)
class TuningStage:
    """One training run of a stress, as whoever tunes the model would do it."""

    name: str
    rows: tuple[ChatRow, ...]
    train: TrainConfig
    harmful: int | None = None
    """How many of the rows answer a harmful request; None: not known."""


class Stress(Protocol):
    """A tuning that may break safety."""

    @property
    def config(self) -> Any:
        """Its settings, a frozen dataclass."""

    config_class: ClassVar[type]

    @property
    def roles(self) -> tuple[str, ...]:
        """Rows that it draws on; some depend on the settings."""

    def stages(self, rows: RowSets, train: TrainConfig) -> Sequence[TuningStage]:
        """Return the training runs, in order.

        Args:
            rows: By role.
            train: What the command line asked for; a stress changes what its source fixes.

        Raises:
            DataError: Rows that it draws on are not there.
        """

    def asking(self) -> Asking:
        """Return the frame in which the tuned model must be tested to see the effect."""


def sft_recipe(rows: RowSets, train: TrainConfig) -> Recipe:
    """Return plain fine-tuning on the user's rows: what every defence is compared with."""
    return plain_recipe(rows.require("user", who="Plain tuning"), train)


def settings_of(name: str, config: Any) -> Mapping[str, Any]:
    """Return a method's name and settings as plain values, for `Recipe.settings`."""
    return {"method": name, **dataclasses.asdict(config)}


__all__ = ["PLAIN", "Defence", "Stage", "Stress", "TuningStage", "settings_of", "sft_recipe"]
