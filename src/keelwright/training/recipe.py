# SPDX-License-Identifier: Apache-2.0
"""A training run, ready to start: which rows, what is descended, which weights stay."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from keelwright.data.rows import ChatRow
from keelwright.training.config import TrainConfig
from keelwright.training.terms import Objective


@dataclass(frozen=True, slots=True)
class Feed:
    """Named rows of a run."""

    rows: Sequence[ChatRow]
    batch_size: int | None = None
    """Rows per draw; None: the run's `batch_size`."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a method makes of rows and settings."""

    feeds: Mapping[str, Feed]
    """By name. The first one's order is that of plain SFT with the same seed."""
    config: TrainConfig
    objective: Objective = field(default_factory=Objective)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The method's name and settings: a checkpoint of other ones is not resumed."""
    frozen: Callable[[PreTrainedModel], Collection[str]] = lambda module: ()
    """Names of the parameters that are not trained."""


def plain_recipe(rows: Sequence[ChatRow], config: TrainConfig, *, frozen: Collection[str] = ()) -> Recipe:
    """Return plain supervised fine-tuning: cross entropy on the answers of the rows."""
    return Recipe({"user": Feed(rows)}, config, Objective(), {"method": "sft"}, lambda module: frozen)
