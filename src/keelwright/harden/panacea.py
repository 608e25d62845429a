# SPDX-License-Identifier: Apache-2.0
"""Panacea: tune so that one last step against the harmful loss, added after tuning, takes harm out again.

For providers who run the user's tuning and hold harmful rows. The model learns the task and, at the same time, a place
from which a small shift of the weights makes harmful answers as unlikely as possible; the shift is added at the end.

Source:
    Panacea: Mitigating Harmful Fine-tuning for Large Language Models via Post-fine-tuning Perturbation,
    arXiv 2501.18100. Code: w-yibo/Panacea.

Equation:
    g = grad u(w) - lambda * (grad h(w + e) - grad h(w)),   e = rho * grad h(w) / (||grad h(w)|| + 1e-7)
    and w + e after the last step; u the loss on the user's rows, h that on harmful rows. Where h(w + e) is above
    `most`, its gradient counts as 0.

    | symbol | name |
    |---|---|
    | u, h(w), h(w + e) | terms `task`, `harm`, `harm after a step` |
    | lambda, rho | `lambda_`, `rho` |

Differs from the official code:
    The released code stops at an undefined name where it clamps h(w + e) at 5; the clamp that it means is applied here,
    to the mean over the whole step. e is taken anew at the final weights, on the harmful rows of the last step (there:
    the e of the last step, from the weights before its update). Weights are copied back (there: subtracted again).

Cost:
    Three forward and backward passes per step and one at the end; two more gradients and one copy of the trained
    weights.

Limits:
    Needs harmful answers. rho is a length in weight space and has no value that fits all models: the paper's 1 is for
    adapters of large ones. The last step is first-order in a few rows, and too long a one breaks the model. In the
    lab (all weights trained, lambda .001, 2 % harmful rows) it takes out little: after 50 steps at 1.5e-4 with rho .2
    harm is .86, .53, .98 over three seeds, against .95, .71, 1.00 of plain tuning (80 requests each). After 150 steps
    at 5e-5 (one seed, plain .97) rho .05 gives .82, rho .2 .55 with .90 of the ordinary requests answered, and with
    rho .5 no request is answered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from keelwright.core.config import require_in_range
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import RowSets
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage, settings_of
from keelwright.training.losses import answer_loss
from keelwright.training.memory import Copies
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.terms import Objective, Shift, Term, WeightShift

if TYPE_CHECKING:
    from keelwright.training.composer import GradientComposer, Taken
    from keelwright.training.setup import Setup


@dataclass(frozen=True, slots=True)
class PanaceaConfig:
    """Settings of Panacea."""

    lambda_: float = 0.001
    """Weight of what the last step gains, 0 or more; 0 is plain tuning and then the last step. The paper: .001."""
    rho: float = 1.0
    """Length of the last step in weight units, 0 or more; 0 is plain tuning. The paper's scripts: 1."""
    most: float = 5.0
    """Mean loss of the harmful rows, nats per token, above which nothing is gained by raising it. The code: 5."""
    harmful_batch: int = 10
    """Harmful rows per step, at least 1. The code: 10."""

    def __post_init__(self) -> None:
        require_in_range("lambda_", self.lambda_, low=0.0)
        require_in_range("rho", self.rho, low=0.0)
        require_in_range("most", self.most, low=0.0)
        require_in_range("harmful_batch", self.harmful_batch, low=1)


@dataclass(frozen=True, slots=True)
class Capped:
    """A shift whose gradient is that of `min(loss, most)`, with the mean loss of the whole step."""

    shift: Shift
    most: float
    """Nats per token."""

    def gradient(self, composer: GradientComposer, term: Term) -> Taken:
        """Return the shift's gradient, or none at all where the loss there is above `most`."""
        taken = self.shift.gradient(composer, term)
        value = float(composer.processes.sum(taken.value.detach()))
        return taken if value <= self.most else replace(taken, gradient=[None] * len(taken.gradient))


@dataclass
class PanaceaObjective(Objective):
    """The task, and a last step that takes harm out."""

    config: PanaceaConfig = PanaceaConfig()
    _steps: int = field(default=1, init=False)

    def begin(self, setup: Setup) -> None:
        """Keep how many steps there are: the last one's harmful rows serve once more."""
        self._steps = setup.config.steps

    def terms(self, step: int) -> Sequence[Term]:
        """Return u - lambda (h(w + e) - h(w))."""
        lambda_, rho = self.config.lambda_, self.config.rho
        task = Term("task", "user")
        if lambda_ == 0.0 or rho == 0.0:
            return (task,)
        return (
            task,
            Term("harm", "harmful", weight=lambda_),
            Term("harm after a step", "harmful", weight=-lambda_, at=Capped(WeightShift(rho), self.config.most)),
        )

    def end(self, composer: GradientComposer) -> None:
        """Add e to the weights."""
        if self.config.rho == 0.0:
            return
        along = composer.reduced(composer.gradient(answer_loss, "harmful", draw=self._steps - 1))
        with torch.no_grad():
            for weight, step in zip(
                composer.weights, WeightShift(self.config.rho).step(composer, along.gradient), strict=True
            ):
                if step is not None:
                    weight.add_(step.to(weight.dtype))

    @contextmanager
    def released(self, composer: GradientComposer) -> Iterator[None]:
        """Hold w + e: it is what would be handed out."""
        with composer.kept_weights():
            self.end(composer)
            yield


@dataclass(frozen=True, slots=True)
class Panacea:
    """Panacea as a defence of the tuning stage."""

    config: PanaceaConfig = PanaceaConfig()

    config_class: ClassVar[type[PanaceaConfig]] = PanaceaConfig
    stage: ClassVar[Stage] = "tuning"
    roles: ClassVar[tuple[str, ...]] = ("harmful",)
    copies: ClassVar[Copies] = Copies(gradients=2, weights=1)

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the tuning run."""
        who = "The defence 'panacea'"
        feeds = {
            "user": Feed(rows.require("user", who=who)),
            "harmful": Feed(rows.require("harmful", who=who), self.config.harmful_batch),
        }
        objective = PanaceaObjective(config=self.config)
        return Recipe(feeds, train, objective, settings_of("panacea", self.config))

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN
