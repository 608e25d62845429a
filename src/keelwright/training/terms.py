# SPDX-License-Identifier: Apache-2.0
"""What a training step descends: terms of a loss, each at the weights or at shifted ones, and pulls to fixed weights.

A method of the literature is an `Objective`: it says which terms each step has. The composer takes their gradients.

    SFT       [Term("task", "user")]
    Booster   [Term("alignment", "safety"), Term("harm", "harmful", weight=lambda_),
               Term("harm after a step", "harmful", weight=-lambda_, at=WeightShift(-alpha))]
    SAM       [Term("task", "user", at=WeightShift(rho))]
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from keelwright.ops.gradients import Gradient, add_scaled, scaled
from keelwright.training.losses import Loss, answer_loss

if TYPE_CHECKING:
    from keelwright.training.composer import GradientComposer, Taken
    from keelwright.training.setup import Setup

Per = Literal["token", "row"]


@dataclass(frozen=True, slots=True)
class Term:
    """One loss on one feed of rows, at one place, with one weight."""

    name: str
    """In logs."""
    feed: str
    """Which rows."""
    weight: float = 1.0
    """Factor of its gradient; a term of weight 0 is not evaluated."""
    loss: Loss = answer_loss
    """Summed over a micro-batch. Two terms that share loss and feed share the gradient at the weights."""
    at: Shift | None = None
    """Where the gradient is taken; None: at the weights."""
    per: Per = "token"
    """What the sum is divided by: the answer tokens, or the rows, of the whole step."""


class Shift(Protocol):
    """A place beside the weights (or beside the activations) at which a term's gradient is taken."""

    def gradient(self, composer: GradientComposer, term: Term) -> Taken:
        """Return the term's gradient there, summed over micro-batches and processes; the weights are as before."""


@dataclass(frozen=True, slots=True)
class WeightShift:
    """Weights moved along the normalised gradient of the term's own loss: `w + size * g / (||g|| + eps)`.

    Source:
        Booster (arXiv 2409.01586, Eq. 3) with `size = -alpha`; Panacea (arXiv 2501.18100) and SAM (arXiv 2010.01412)
        with `size = rho`. The derivative of the step itself is dropped in all three. Adaptive: arXiv 2102.11600.
    """

    size: float
    """Length of the step in weight units; above 0 it climbs the loss, below 0 it descends."""
    eps: float = 1e-7
    """Added to the norm."""
    adaptive: bool = False
    """Each weight moves in proportion to its square: `w + size * w^2 g / (|| |w| g || + eps)`."""

    def gradient(self, composer: GradientComposer, term: Term) -> Taken:
        """Return the gradient of the same rows at the moved weights."""
        along = composer.reduced(composer.gradient(term.loss, term.feed, per=term.per))
        with composer.moved(self.step(composer, along.gradient)):
            return composer.gradient(term.loss, term.feed, per=term.per)

    def step(self, composer: GradientComposer, along: Gradient) -> Gradient:
        """Return what is added to the weights.

        Args:
            composer: At the weights from which the step goes.
            along: A gradient summed over the processes.
        """
        if not self.adaptive:
            return scaled(along, self.size / (float(composer.norm(along)) + self.eps))
        sizes = [
            weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32)) for weight in composer.weights
        ]
        once = [None if one is None else size * one for size, one in zip(sizes, along, strict=True)]
        twice = [None if one is None else size * one for size, one in zip(sizes, once, strict=True)]
        return scaled(twice, self.size / (float(composer.norm(once)) + self.eps))


@dataclass(frozen=True, slots=True)
class Anchor:
    """A pull `strength * scale * (w - target)`, added to the gradient without autograd."""

    target: Sequence[Tensor]
    """Where it pulls to: one tensor per trained weight."""
    strength: float
    scale: Sequence[Tensor] | None = None
    """Per entry; None: 1 everywhere."""


@dataclass
class Objective:
    """What a training run descends; made for one run, whose state it may hold. The defaults are those of plain SFT.

    A method overrides what it needs, mostly `terms` alone.
    """

    feed: str = "user"
    """The rows that plain SFT learns."""
    figures: dict[str, float] = field(default_factory=dict, init=False)
    """What the last step measured beside its terms: copied into the run's log after each step."""

    def begin(self, setup: Setup) -> None:
        """Measure what is needed at the starting weights. Called once, before a checkpoint is read."""

    def terms(self, step: int) -> Sequence[Term]:
        """Return the terms of a step, counted from 0. The first one's value is the run's loss."""
        return (Term("loss", self.feed),)

    def anchors(self, step: int) -> Sequence[Anchor]:
        """Return the pulls of a step."""
        return ()

    def combine(self, step: int, gradients: Mapping[str, Gradient]) -> Gradient | None:
        """Return the step's gradient from those of its terms (reduced, unweighted, by name); None: their weighted sum.

        Only for methods that are not a sum, such as gradient surgery.
        """
        return None

    def trained(self, step: int) -> Collection[str] | None:
        """Return the names of the weights that the step changes; None: all that are trained at all.

        Asked after `terms`; the gradients of the other weights are not taken.
        """
        return None

    def end(self, composer: GradientComposer) -> None:
        """Change the weights once more after the last step."""

    def released(self, composer: GradientComposer) -> AbstractContextManager[object]:
        """Hold the weights as `end` would leave them now, while a model in training is measured."""
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold beside weights and optimiser."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the state of a checkpoint."""


def pulled(gradient: Gradient, weights: Sequence[Tensor], anchor: Anchor) -> Gradient:
    """Return the gradient with the anchor's pull added."""
    pull: list[Tensor] = []
    for index, (weight, target) in enumerate(zip(weights, anchor.target, strict=True)):
        away = weight.detach() - target
        pull.append(away if anchor.scale is None else away * anchor.scale[index])
    return add_scaled(gradient, pull, anchor.strength)
