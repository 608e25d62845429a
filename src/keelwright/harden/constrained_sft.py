# SPDX-License-Identifier: Apache-2.0
"""Constrained SFT: learn the user's rows, but leave the first answer tokens near the aligned model.

For whoever controls the user's run. Refusals live in the first few tokens of an answer. Each token's loss is weighted
down as soon as the model gives the token more probability than the aligned model did; strongly for the first five
tokens, hardly for the rest. No further rows are needed.

Source:
    Safety Alignment Should Be Made More Than Just a Few Tokens Deep, arXiv 2406.05946 (section 4). Official code:
    Unispac/shallow-vs-deep-alignment.

Equation:
    L = mean_t -(2 / beta_t) log sigma(beta_t delta_t),   delta_t = log p_w(y_t | ...) - log p_0(y_t | ...)
    grad L = mean_t w_t grad(-log p_w(y_t)),   w_t = 2 (1 - sigma(beta_t delta_t)), not below 1e-3

    | symbol | name |
    |---|---|
    | beta_1 | `beta_first` |
    | beta_2 .. beta_5 | `beta_early`, `early_tokens` |
    | beta_t, t > 5 | `beta_rest` |
    | p_0, p_w | the aligned model, the model that is trained |

Differs from the official code:
    The mean runs over the answer tokens of the whole step (there: of each micro-batch). All three betas can be scaled
    together. Like there, what is descended and reported is the weighted cross entropy, not L.

Cost:
    One forward and one backward pass per step, and one forward pass over the user's rows before the first. Memory: 4
    bytes per answer token.

Limits:
    Slows learning where the first tokens carry the task: an answer of one word is such a token. In the lab (2 % bad
    rows, 75 steps at 1.5e-4) the paper's betas leave harm at .85 where plain tuning has .95 (one seed); times 3 it is
    .17, .04 and .06 on three seeds. Tuned long enough on harmful rows, the model still learns them: no token's weight
    is ever 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import RowSets
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage, settings_of
from keelwright.training.losses import Forward, Loss, answer_loss
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.reference import AtAnswers, answer_losses, answer_places, kept_logprobs
from keelwright.training.rows import Batch
from keelwright.training.setup import Setup
from keelwright.training.terms import Objective, Term

LEAST_WEIGHT: Final = 1e-3
"""No token is dropped altogether. The code's value."""


@dataclass(frozen=True, slots=True)
class ConstrainedSftConfig:
    """Settings of constrained SFT."""

    beta_first: float = 0.5
    """Strength at the first answer token, 0 or more. The paper: 0.5."""
    beta_early: float = 2.0
    """Strength at the early tokens after the first, 0 or more. The paper: 2."""
    early_tokens: int = 5
    """How many tokens count as early, the first included; at least 1. The paper: 5."""
    beta_rest: float = 0.1
    """Strength at all later tokens, 0 or more. The paper: 0.1."""
    scale: float = 1.0
    """Multiplies all three, 0 or more; 0 is plain tuning, 1 the paper."""

    def __post_init__(self) -> None:
        for name in ("beta_first", "beta_early", "beta_rest", "scale"):
            require_in_range(name, getattr(self, name), low=0.0)
        require_in_range("early_tokens", self.early_tokens, low=1)


def token_betas(places: Tensor, config: ConstrainedSftConfig) -> Tensor:
    """Return beta_t of answer tokens by their place.

    Args:
        places: Which token of its answer each is, counted from 0. Shape `[answers]`.
        config: The strengths.
    """
    betas = torch.full(places.shape, config.beta_rest, device=places.device)
    betas[places < config.early_tokens] = config.beta_early
    betas[places == 0] = config.beta_first
    return betas * config.scale


def token_weights(delta: Tensor, betas: Tensor) -> Tensor:
    """Return w_t, from 1e-3 to 2: 1 where nothing has moved, less where a token has become likelier.

    Args:
        delta: log p_w - log p_0, nats. Shape `[answers]`.
        betas: Strengths. Shape `[answers]`.
    """
    # sigma(-x) is 1 - sigma(x) without its rounding at large x.
    return (2.0 * torch.sigmoid(-betas * delta)).clamp(min=LEAST_WEIGHT)


@dataclass(frozen=True, slots=True, eq=False)
class ConstrainedLoss:
    """The weighted cross entropy of the answer tokens, in nats."""

    reference: AtAnswers
    """log p_0 of the answer tokens, nats. Shape `[answers]`."""
    config: ConstrainedSftConfig

    def __call__(self, model: Forward, batch: Batch) -> Tensor:
        """Return the sum over a micro-batch."""
        losses = answer_losses(model, batch)
        delta = -losses.detach() - self.reference(batch)
        return (token_weights(delta, token_betas(answer_places(batch), self.config)) * losses).sum()


@dataclass
class ConstrainedSftObjective(Objective):
    """The user's rows, token by token."""

    config: ConstrainedSftConfig = ConstrainedSftConfig()

    def begin(self, setup: Setup) -> None:
        """Measure the aligned model's log-probabilities of all rows."""
        self._loss: Loss = answer_loss
        if self.config.scale:
            self._loss = ConstrainedLoss(kept_logprobs(setup, self.feed), self.config)

    def terms(self, step: int) -> Sequence[Term]:
        """Return the weighted loss."""
        return (Term("loss", self.feed, loss=self._loss),)


@dataclass(frozen=True, slots=True)
class ConstrainedSft:
    """Constrained SFT as a defence of the tuning stage."""

    config: ConstrainedSftConfig = ConstrainedSftConfig()

    config_class: ClassVar[type[ConstrainedSftConfig]] = ConstrainedSftConfig
    stage: ClassVar[Stage] = "tuning"
    roles: ClassVar[tuple[str, ...]] = ()

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the user's run."""
        feeds = {"user": Feed(rows.require("user", who="The defence 'constrained_sft'"))}
        objective = ConstrainedSftObjective(config=self.config)
        return Recipe(feeds, train, objective, settings_of("constrained_sft", self.config))

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN
