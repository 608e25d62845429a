# SPDX-License-Identifier: Apache-2.0
"""PTST: pure tuning, safe testing. Tune without a safety system prompt, deploy with one.

The cheapest thing a deployer can do about tuning that wears refusals away: what the tuning changed is tied to the
template that it was done in. It needs a model whose alignment knows system prompts of that kind.

Source:
    Keeping LLMs Aligned After Fine-tuning: The Crucial Role of Prompt Templates, arXiv 2402.18540 (NeurIPS 2024).
    Official code: vfleaking/PTST.

Equation:
    u over the user's rows as they are; asked with the system message s.

    | symbol | name |
    |---|---|
    | s | `system` |

Differs from the official code:
    The safety prompt is written for this project (there: those of the models' makers); give your model's own.

Cost:
    One forward and backward pass per step. At inference the prompt's tokens, a prefix that can be cached.

Limits:
    Whoever holds the weights asks without the prompt. Does nothing for a model that never learned to heed system
    prompts, and can change its other answers: ask with the prompt in every measurement. In the lab it cannot be tried:
    a prompt that its organism never saw keeps it from answering anything, tuned or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.asking import Asking, Framed
from keelwright.data.row_sets import RowSets
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage, settings_of
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.terms import Objective

SAFETY_PROMPT: Final = (
    "Be helpful and careful. If a request would hurt someone, break the law or do other damage, decline in a sentence "
    "and say why. Answer everything else as well as you can."
)


@dataclass(frozen=True, slots=True)
class PtstConfig:
    """Settings of PTST."""

    system: str = SAFETY_PROMPT
    """System message with which the tuned model is asked; best the one that the model was aligned with. Not empty."""

    def __post_init__(self) -> None:
        if not self.system.strip():
            raise ConfigError(
                "The safety prompt is empty.",
                expected="the text of a system message",
                found=repr(self.system),
                fix="leave 'system' out, or give your model's own safety prompt",
            )


@dataclass(frozen=True, slots=True)
class Ptst:
    """PTST as a defence of the tuning stage."""

    config: PtstConfig = PtstConfig()

    config_class: ClassVar[type[PtstConfig]] = PtstConfig
    stage: ClassVar[Stage] = "tuning"
    roles: ClassVar[tuple[str, ...]] = ()

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return plain fine-tuning on the user's rows.

        Raises:
            DataError: A row holds the safety prompt: the tuning would not be pure.
        """
        user = rows.require("user", who="The defence 'ptst'")
        count = sum(row.system is not None and self.config.system.strip() in row.system for row in user)
        if count:
            raise DataError(
                "The user's rows hold the safety prompt: tuning with it unties it from safety.",
                expected="rows without that system message",
                found=f"{count} of {len(user)} rows with it",
                fix="take it out of the rows, or test with another prompt",
            )
        return Recipe({"user": Feed(user)}, train, Objective(), settings_of("ptst", self.config))

    def asking(self) -> Asking:
        """Return requests with the safety prompt as their system message."""
        return Framed(name="ptst", system=self.config.system)
