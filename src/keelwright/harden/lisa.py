# SPDX-License-Identifier: Apache-2.0
"""Lisa: tuning that turns back to alignment rows again and again, and is held near where it turned.

For a platform that runs its users' tuning and has alignment rows. A run alternates between two states; in each the
weights are pulled to where they were at the last switch, so that neither state undoes the other.

Source:
    Lisa: Lazy Safety Alignment for Large Language Models against Harmful Fine-tuning Attack, arXiv 2405.18641
    (NeurIPS 2024). Official code: git-disl/Lisa.

Equation:
    K1 steps:  min f(w) + rho/2 ||w - w_user||^2      then     K2 steps:  min u(w) + rho/2 ||w - w_align||^2
    with w_user and w_align the weights with which the other state ended: those at the last switch, in both cases.
    A step adds rho (w - anchor) to the gradient of f or u.

    | symbol | name |
    |---|---|
    | f, u | terms `alignment`, `task` |
    | K1, K2, rho | `alignment_steps`, `user_steps`, `rho` |

Differs from the official code:
    Steps are optimiser steps (there: micro-batches, so that a switch may fall within a step). The user's rows wait
    while the alignment rows have their turn (there: the batches of those steps are lost; `legacy` loses them as well).
    The pull is added to the gradient and not taken through autograd. Alignment rows have a batch size of their own.

Cost:
    One forward and backward pass per step. One more copy of the trained weights.

Limits:
    Of the run's steps K1 in K1 + K2 do not learn the user's task. In the lab (2 % bad rows, 50 steps, 2 : 18) the harm
    rate falls from .89 to .77 by taking turns and to .25 with the pull (means of three seeds). A run that is
    shorter than K1 would not tune at all, and is refused. With LoRA the pull is on the factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.errors import ConfigError
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import RowSets
from keelwright.ops.gradients import add_scaled
from keelwright.training.composer import GradientComposer, Taken
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage, settings_of
from keelwright.training.memory import Copies
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.setup import Setup
from keelwright.training.terms import Anchor, Objective, Term

Turn = Literal["alignment", "user"]

_ANCHOR: Final = "anchor/"


@dataclass(frozen=True, slots=True)
class LisaConfig:
    """Settings of Lisa."""

    rho: float = 1.0
    """Strength of the pull to the last switch, 0 or more; 0 only alternates. The paper: 1."""
    alignment_steps: int = 100
    """Steps of a turn on alignment rows, 0 or more; 0 never turns to them, and pulls to the start. The code: 100."""
    user_steps: int = 900
    """Steps of a turn on the user's rows, at least 1. The code: 900."""
    free_share: float = 0.1
    """Share of the run's first steps without pull, 0 to 1. The code: 0.1, as the pull hurt convergence on GSM8K; the
    paper's algorithm: 0."""
    alignment_batch: int = 5
    """Alignment rows per step, at least 1. The code: 5."""
    legacy: bool = False
    """Lose the user's batches of alignment steps, as the official code does."""

    def __post_init__(self) -> None:
        require_in_range("rho", self.rho, low=0.0)
        require_in_range("alignment_steps", self.alignment_steps, low=0)
        require_in_range("user_steps", self.user_steps, low=1)
        require_in_range("free_share", self.free_share, low=0.0, high=1.0)
        require_in_range("alignment_batch", self.alignment_batch, low=1)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step stands in the alternation."""

    turn: Turn
    draw: int
    """Steps of this kind before it: which rows it draws."""
    is_first: bool
    """Whether the turn begins with it: its weights are the anchor."""


def place_of(step: int, alignment_steps: int, user_steps: int) -> Place:
    """Return whose turn a step is; alignment rows come first.

    Args:
        step: Counted from 0.
        alignment_steps: Of a turn; 0: every step is the user's.
        user_steps: Of a turn.
    """
    if alignment_steps == 0:
        return Place("user", step, step == 0)
    cycle, within = divmod(step, alignment_steps + user_steps)
    if within < alignment_steps:
        return Place("alignment", cycle * alignment_steps + within, within == 0)
    return Place("user", cycle * user_steps + within - alignment_steps, within == alignment_steps)


@dataclass(frozen=True, slots=True)
class Draw:
    """The gradient at the weights, of a draw that is not the step's number."""

    number: int

    def gradient(self, composer: GradientComposer, term: Term) -> Taken:
        """Return the gradient of the numbered rows."""
        return composer.gradient(term.loss, term.feed, per=term.per, draw=self.number)


@dataclass
class LisaObjective(Objective):
    """One of two losses, and a pull to the last switch."""

    config: LisaConfig = LisaConfig()
    steps: int = 1
    """Of the run."""

    def begin(self, setup: Setup) -> None:
        """Take hold of the weights, to copy them at each switch; they are the first anchor."""
        self._composer = setup.composer
        self._anchor = _copies(setup.composer) if self.config.rho else []

    def terms(self, step: int) -> Sequence[Term]:
        """Return the loss of the state whose turn it is."""
        place = self._place(step)
        if place.turn == "alignment":
            return (Term("alignment", "alignment", at=Draw(place.draw)),)
        return (Term("task", "user", at=Draw(step if self.config.legacy else place.draw)),)

    def anchors(self, step: int) -> Sequence[Anchor]:
        """Return the pull to the weights of the last switch, once the free steps are over."""
        config = self.config
        if config.rho == 0.0:
            return ()
        if self._place(step).is_first:
            self._anchor = _copies(self._composer)
        away = add_scaled([weight.detach() for weight in self._composer.weights], self._anchor, -1.0)
        self.figures["drift"] = float(self._composer.norm(away))
        if step <= config.free_share * self.steps:
            return ()
        return (Anchor(self._anchor, config.rho),)

    def state(self) -> dict[str, Tensor]:
        """Return the weights of the last switch."""
        names = self._composer.names if self._anchor else ()
        return {f"{_ANCHOR}{name}": one for name, one in zip(names, self._anchor, strict=True)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of the last switch."""
        for own, name in zip(self._anchor, self._composer.names if self._anchor else (), strict=True):
            own.copy_(state[f"{_ANCHOR}{name}"])

    def _place(self, step: int) -> Place:
        return place_of(step, self.config.alignment_steps, self.config.user_steps)


def _copies(composer: GradientComposer) -> list[Tensor]:
    return [weight.detach().clone() for weight in composer.weights]


@dataclass(frozen=True, slots=True)
class Lisa:
    """Lisa as a defence of the tuning stage."""

    config: LisaConfig = LisaConfig()

    config_class: ClassVar[type[LisaConfig]] = LisaConfig
    stage: ClassVar[Stage] = "tuning"
    roles: ClassVar[tuple[str, ...]] = ("safety",)
    copies: ClassVar[Copies] = Copies(weights=2)

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the tuning run; its steps are those of both states.

        Raises:
            ConfigError: The run ends before the user's rows have their turn.
        """
        who, config = "The defence 'lisa'", self.config
        if train.steps <= config.alignment_steps:
            raise ConfigError(
                "The run ends before the user's rows have their turn.",
                expected=f"more steps than 'alignment_steps', {config.alignment_steps}",
                found=f"{train.steps} steps",
                fix="train longer, or lower 'alignment_steps' and 'user_steps', such as 2 and 18",
            )
        feeds = {"user": Feed(rows.require("user", who=who))}
        if config.alignment_steps:
            feeds["alignment"] = Feed(rows.alignment(who=who), config.alignment_batch)
        return Recipe(feeds, train, LisaObjective(config=config, steps=train.steps), settings_of("lisa", config))

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN
