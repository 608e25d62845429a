# SPDX-License-Identifier: Apache-2.0
"""Booster: align so that one harmful step would buy little.

For whoever owns the alignment run and lets others tune the model later. While the model learns to refuse, the loss that
a simulated step on harmful answers would save is made small as well. Nothing is needed at tuning time.

Source:
    Booster: Tackling Harmful Fine-tuning for Large Language Models via Attenuating Harmful Perturbation,
    arXiv 2409.01586 (Algorithm 1). Official code: git-disl/Booster.

Equation:
    g = grad f(w) + lambda * (grad h(w) - grad h(w')),   w' = w - alpha * grad h(w) / ||grad h(w)||_2
    with f the loss on alignment rows, h the loss on harmful rows; the derivative of the normalised step is dropped.

    | symbol | name |
    |---|---|
    | f, h | terms `alignment`, `harm` |
    | lambda, alpha | `lambda_`, `alpha` |

Differs from the official code:
    Weights are copied back after the simulated step (there: added back, which is no identity in half precision).
    Gradient accumulation is right (there: each micro-batch wipes the one before). The norm is float32 and, over several
    processes, that of the summed gradient. Both harmful passes drop the same units. The loss that is reported is f
    (there: h). The defaults are those of the paper's scripts, not those of the code's argument parser.

Cost:
    Three forward and backward passes per step; two more gradients and one copy of the trained weights. Over several
    processes three sums of a gradient, one of them for the figures.

Limits:
    Holds against small steps of first-order tuning; more steps or a higher rate overcome it. Needs harmful answers.
    From a model that answers everything it can keep refusals from being learned: start from an aligned one, with a
    small `alpha`. In the lab `alpha` .05 works (after a tuning of 150 steps at 5e-5 with 2 % harmful rows harm .13,
    .00, .00 over three seeds, after as many plain alignment steps .98, .65, .85) and .1 oversteps: the simulated step
    then raises the harmful loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from keelwright.core.config import require_in_range
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import RowSets
from keelwright.ops.gradients import Gradient, add_scaled
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage, settings_of
from keelwright.training.memory import Copies
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.terms import Objective, Term, WeightShift

if TYPE_CHECKING:
    from keelwright.training.composer import GradientComposer
    from keelwright.training.setup import Setup


@dataclass(frozen=True, slots=True)
class BoosterConfig:
    """Settings of Booster."""

    lambda_: float = 5.0
    """Weight of the harmful loss drop, 0 or more; 0 is plain alignment. The paper's scripts: 5."""
    alpha: float = 0.1
    """Length of the simulated step in weight units, 0 or more; 0 is plain alignment. The paper's scripts: 0.1."""
    harmful_batch: int = 10
    """Harmful rows per step, at least 1. The code: 10."""

    def __post_init__(self) -> None:
        require_in_range("lambda_", self.lambda_, low=0.0)
        require_in_range("alpha", self.alpha, low=0.0)
        require_in_range("harmful_batch", self.harmful_batch, low=1)


@dataclass
class BoosterObjective(Objective):
    """Refusals, and a small drop of the harmful loss.

    Its figures, beside the losses of its terms (whose difference is the drop): `harm_gradient`, ||grad h(w)||, and
    `harm_gradient_change`, ||grad h(w) - grad h(w')||.
    """

    config: BoosterConfig = BoosterConfig()
    _composer: GradientComposer | None = field(default=None, init=False)

    def begin(self, setup: Setup) -> None:
        """Keep what takes norms."""
        self._composer = setup.composer

    def terms(self, step: int) -> Sequence[Term]:
        """Return f + lambda (h(w) - h(w'))."""
        lambda_, alpha = self.config.lambda_, self.config.alpha
        alignment = Term("alignment", "safety")
        if lambda_ == 0.0 or alpha == 0.0:
            return (alignment,)
        return (
            alignment,
            Term("harm", "harmful", weight=lambda_),
            Term("harm after a step", "harmful", weight=-lambda_, at=WeightShift(-alpha)),
        )

    def combine(self, step: int, gradients: Mapping[str, Gradient]) -> None:
        """Measure the two harmful gradients; the step is their weighted sum."""
        if self._composer is not None and "harm" in gradients:
            before, after = gradients["harm"], gradients["harm after a step"]
            self.figures["harm_gradient"] = float(self._composer.norm(before))
            self.figures["harm_gradient_change"] = float(self._composer.norm(add_scaled(before, after, -1.0)))


@dataclass(frozen=True, slots=True)
class Booster:
    """Booster as a defence of the alignment stage."""

    config: BoosterConfig = BoosterConfig()

    config_class: ClassVar[type[BoosterConfig]] = BoosterConfig
    stage: ClassVar[Stage] = "alignment"
    roles: ClassVar[tuple[str, ...]] = ("safety", "harmful")
    copies: ClassVar[Copies] = Copies(gradients=2, weights=1)

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the alignment run."""
        who = "The defence 'booster'"
        feeds = {
            "safety": Feed(rows.alignment(who=who)),
            "harmful": Feed(rows.require("harmful", who=who), self.config.harmful_batch),
        }
        objective = BoosterObjective(config=self.config)
        return Recipe(feeds, train, objective, settings_of("booster", self.config))

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN
