# SPDX-License-Identifier: Apache-2.0
"""Vaccine: align under the worst small shift of the hidden states.

For whoever owns the alignment run and lets others tune the model later. Harmful tuning drifts the hidden states; a
model that refuses although its attention outputs are moved against it should be drifted less easily.

Source:
    Vaccine: Perturbation-aware Alignment for Large Language Models against Harmful Fine-tuning Attack,
    arXiv 2402.01109. Official code: git-disl/Vaccine.

Equation:
    g = grad_w f(w; a_1 + e_1, ..., a_L + e_L),   e_l = rho * G_l / (sqrt(sum_l ||G_l||^2) + 1e-7)
    with f the loss on alignment rows, a_l the output of attention in block l, G_l the gradient of f there; e_l is
    constant in the second pass. `noise`: e_l ~ sqrt(rho) * N(0, I).

    | symbol | name |
    |---|---|
    | f | term `alignment` |
    | rho | `rho` |
    | a_l | outputs of `training.sites.attention_outputs` |

Differs from the official code:
    The shift is added inside the graph (there: written into the tensor's storage). Padding is not moved. With gradient
    accumulation and with several processes the norm is that of the whole step (there: of each part). Noise is keyed by
    step and row. Works on every architecture whose attention is found by its name (there: a list of classes).

Cost:
    Two forward and backward passes per step, the first without gradients of weights; with `noise` one. One tensor
    `[batch, tokens, d_model]` per block.

Limits:
    rho is the length over all rows, tokens and blocks: tune it again when the batch or the rows' length changes. In
    the lab it does nothing. Hardened from the aligned organism for 100 steps of 32 rows at 3e-4 with rho 2, then
    tuned for 50 steps at 1.5e-4 with 2 % harmful rows, it has harm rates of 1.00, .67, .93 over three seeds; after as
    many plain alignment steps they are .98, .69, .89, after Booster's .14, .00, .00 (80 requests each). With `noise`
    of rho .01 the rate is 1.00 (one seed). In an earlier trial a rho of 40 and more broke the refusals themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from keelwright.core.config import require_choice, require_in_range
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import RowSets
from keelwright.training.activation_shift import ActivationNoise, ActivationShift
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage, settings_of
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.setup import Setup
from keelwright.training.terms import Objective, Shift, Term

Direction = Literal["gradient", "noise"]


@dataclass(frozen=True, slots=True)
class VaccineConfig:
    """Settings of Vaccine."""

    rho: float = 2.0
    """Length of the shift in units of the activations, 0 or more; with `noise` the variance of each entry. 0 is plain
    alignment. The official code's README: 2."""
    direction: Direction = "gradient"
    """`gradient`: against the loss; `noise`: at random, in one pass."""

    def __post_init__(self) -> None:
        require_in_range("rho", self.rho, low=0.0)
        require_choice("direction", self.direction, get_args(Direction))


@dataclass
class VaccineObjective(Objective):
    """Refusals at shifted activations."""

    config: VaccineConfig = VaccineConfig()
    seed: int = 0
    """Of the noise."""

    def begin(self, setup: Setup) -> None:
        """Take the run's seed."""
        self.seed = setup.config.seed

    def terms(self, step: int) -> Sequence[Term]:
        """Return f at shifted activations."""
        return (Term("alignment", "safety", at=self._shift()),)

    def _shift(self) -> Shift | None:
        if self.config.rho == 0.0:
            return None
        if self.config.direction == "noise":
            return ActivationNoise(self.config.rho, seed=self.seed)
        return ActivationShift(self.config.rho)


@dataclass(frozen=True, slots=True)
class Vaccine:
    """Vaccine as a defence of the alignment stage."""

    config: VaccineConfig = VaccineConfig()

    config_class: ClassVar[type[VaccineConfig]] = VaccineConfig
    stage: ClassVar[Stage] = "alignment"
    roles: ClassVar[tuple[str, ...]] = ("safety",)

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the alignment run."""
        feeds = {"safety": Feed(rows.alignment(who="The defence 'vaccine'"))}
        return Recipe(feeds, train, VaccineObjective(config=self.config), settings_of("vaccine", self.config))

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN
