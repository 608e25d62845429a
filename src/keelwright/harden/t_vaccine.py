# SPDX-License-Identifier: Apache-2.0
"""T-Vaccine: Vaccine on a few blocks at a time, those that harmful rows pull at most.

For alignment runs in which Vaccine's memory is too much: only some blocks are shifted and trained in each step.

Source:
    Targeted Vaccine: Safety Alignment for Large Language Models against Harmful Fine-Tuning via Layer-wise
    Perturbation, arXiv 2410.09760. Official code: Lslland/T-Vaccine.

Equation:
    every K steps:  s_l = ||G_l(harmful rows)||,  p_l = s_l / sum_l s_l
    every J steps:  S different blocks, drawn one after the other with probabilities p
    g = grad_w f(w; a_l + e_l for the drawn l),  e_l = rho * G_l / (sqrt(sum_l ||G_l||^2) + 1e-7), l over the drawn
    Only the weights of the drawn blocks are trained; the optimiser keeps the state of the others.

    | symbol | name |
    |---|---|
    | rho, S, J, K | `rho`, `blocks`, `draw_every`, `measure_every` |
    | f | term `alignment` |

Differs from the official code:
    As in Vaccine: shift inside the graph, padding not moved, one norm per step. All weights of a drawn block are
    trained (there: the adapters of its attention, and always those elsewhere). The harmful rows of one measurement
    are a batch of `harmful_batch` (there: one row). In models of more than 26 blocks the official code also lists the
    block before each drawn one; it reads that list only to decide whose activations are not computed again in the
    backward pass, so nothing of it is in the numbers, nor here.

Cost:
    Two forward and backward passes per step, the first without gradients of weights and the second with those of S
    blocks; one pass more in every K steps. One tensor `[batch, tokens, d_model]` per drawn block.

Limits:
    Vaccine's: see there. In the lab, with two of four blocks at a time, it prevents as little: harm rates of 1.00, .69,
    1.00 where plain alignment has .98, .69, .89. Embeddings and output head are not trained. In a model with fewer
    than S blocks all of them are drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.errors import NumericalError
from keelwright.core.seeds import generator
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import RowSets
from keelwright.training.activation_shift import ActivationShift, activation_gradients
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage, settings_of
from keelwright.training.losses import answer_loss
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.setup import Setup
from keelwright.training.sites import attention_outputs, blocks
from keelwright.training.terms import Objective, Term


@dataclass(frozen=True, slots=True)
class TVaccineConfig:
    """Settings of T-Vaccine."""

    rho: float = 3.0
    """Length of the shift in units of the activations, 0 or more. The official scripts: 3."""
    blocks: int = 8
    """How many blocks are shifted and trained at a time, at least 1; all, where the model has fewer. There: 8."""
    draw_every: int = 20
    """Steps between draws of blocks, at least 1. There: 20."""
    measure_every: int = 200
    """Steps between measurements of the probabilities, at least 1. There: 200."""
    harmful_batch: int = 10
    """Harmful rows of one measurement, at least 1."""

    def __post_init__(self) -> None:
        require_in_range("rho", self.rho, low=0.0)
        for name in ("blocks", "draw_every", "measure_every", "harmful_batch"):
            require_in_range(name, getattr(self, name), low=1)


def block_probabilities(norms: Tensor) -> Tensor:
    """Return each block's share of the summed gradient norms, in float64. Shape `[layers]`.

    Blocks without any gradient have a chance of 1e-9 of the largest, so that as many as wanted can be drawn.

    Args:
        norms: Of the harmful loss's gradient at each block's attention output, 0 or more. Shape `[layers]`.

    Raises:
        NumericalError: A norm is not finite.
    """
    found = norms.double().cpu()
    if not bool(torch.isfinite(found).all()):
        raise NumericalError(
            "The gradient of the harmful rows is not finite in some block.",
            expected="finite norms",
            found=f"{int((~torch.isfinite(found)).sum())} of {len(found)} are not",
            fix="check the model's weights and the harmful rows",
        )
    if float(found.max()) == 0.0:
        return torch.full_like(found, 1.0 / len(found))
    raised = found.clamp_min(1e-9 * float(found.max()))
    return raised / raised.sum()


def draw_blocks(probabilities: Tensor, count: int, *, source: torch.Generator) -> tuple[int, ...]:
    """Return different blocks, drawn one after the other with the probabilities, in rising order."""
    drawn = torch.multinomial(probabilities, min(count, len(probabilities)), replacement=False, generator=source)
    return tuple(sorted(drawn.tolist()))


@dataclass
class TVaccineObjective(Objective):
    """Refusals at activations shifted in the drawn blocks."""

    config: TVaccineConfig = TVaccineConfig()
    probabilities: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64), init=False)
    """Shape `[layers]`; empty before the first measurement."""
    drawn: tuple[int, ...] = field(default=(), init=False)
    """Blocks that are shifted and trained now."""
    _setup: Setup | None = field(default=None, init=False)

    def begin(self, setup: Setup) -> None:
        """Keep what measures and names the blocks."""
        self._setup = setup

    def terms(self, step: int) -> Sequence[Term]:
        """Return f at activations that are shifted in the drawn blocks."""
        if step % self.config.measure_every == 0:
            composer = self._begun().composer
            sites = attention_outputs(composer.model)
            self.probabilities = block_probabilities(
                activation_gradients(composer, answer_loss, "harmful", sites).norms
            )
        if step % self.config.draw_every == 0:
            source = generator(self._begun().config.seed, "training", "t_vaccine", step)
            self.drawn = draw_blocks(self.probabilities, self.config.blocks, source=source)
        shift = ActivationShift(self.config.rho, layers=self.drawn) if self.config.rho else None
        return (Term("alignment", "safety", at=shift),)

    def trained(self, step: int) -> Collection[str]:
        """Return the names of the weights in the drawn blocks."""
        composer = self._begun().composer
        names = list(blocks(composer.model))
        prefixes = tuple(f"{names[index]}." for index in self.drawn)
        return {name for name in composer.names if name.startswith(prefixes)}

    def state(self) -> dict[str, Tensor]:
        """Return the probabilities and the drawn blocks."""
        return {"probabilities": self.probabilities, "drawn": torch.tensor(self.drawn, dtype=torch.int64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take both from a checkpoint."""
        self.probabilities, self.drawn = state["probabilities"], tuple(state["drawn"].tolist())

    def _begun(self) -> Setup:
        if self._setup is None:
            raise RuntimeError("the run has not begun")
        return self._setup


@dataclass(frozen=True, slots=True)
class TVaccine:
    """T-Vaccine as a defence of the alignment stage."""

    config: TVaccineConfig = TVaccineConfig()

    config_class: ClassVar[type[TVaccineConfig]] = TVaccineConfig
    stage: ClassVar[Stage] = "alignment"
    roles: ClassVar[tuple[str, ...]] = ("safety", "harmful")

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the alignment run."""
        who = "The defence 't_vaccine'"
        feeds = {
            "safety": Feed(rows.alignment(who=who)),
            "harmful": Feed(rows.require("harmful", who=who), self.config.harmful_batch),
        }
        objective = TVaccineObjective(config=self.config)
        return Recipe(feeds, train, objective, settings_of("t_vaccine", self.config))

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN
