# SPDX-License-Identifier: Apache-2.0
"""Elastic weight consolidation: hold each weight as firmly as refusals depend on it.

For whoever controls the user's run and has refusals to measure on. How much the refusals' likelihood would suffer from
a change of one weight is measured once, as the diagonal of the Fisher information; then the weights are pulled back
with springs of that stiffness.

Source:
    Overcoming catastrophic forgetting in neural networks, arXiv 1612.00796 (Eq. 3). Read for comparison:
    git-disl/Booster.

Equation:
    L = u + (lambda / 2) sum_i F_i (w_i - w0_i)^2,   F_i = mean_rows (d log p_w0(y | x) / d w_i)^2 / normaliser

    | symbol | name |
    |---|---|
    | u | term `loss`, on the user's rows |
    | F | Fisher of whole answers on safety rows, brought to mean 1 over the trained weights |
    | y | under `empirical` the row's refusal; under `sampled` an answer drawn from the model itself |
    | lambda | `lambda_` |
    | w0 | weights at the start |

Differs from the official code:
    The paper has none. The port squares the gradient of a whole batch, which is not the sum of its rows' squares, sums
    over batches without a mean, has no one half, and knows LoRA factors only.

Cost:
    One forward and backward pass per step, and before the first one per safety row, a row at a time (`sampled`: and a
    forward pass per token). Memory: three copies of the trained weights: the Fisher, the start, and one per sum.

Limits:
    A new LoRA adapter cannot be held so: its second factor is 0 at the start, and so is the Fisher of the first; that
    is an error. The Fisher is diagonal and of the start: it knows no directions across weights, and of weights far away
    nothing. `lambda_` is in units of a mean Fisher of 1 and must be swept: in the lab (2 % bad rows, 75 steps at
    1.5e-4) 1 leaves harm at .97 (first seed), 100 keeps it at .00 on three seeds, where plain tuning has .95, .71 and
    1.00; but the loss on the user's rows of the first then ends at .35 in place of .14.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import ConfigError, NumericalError
from keelwright.core.seeds import generator
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import RowSets
from keelwright.ops.gradients import Gradient, add_scaled
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage, settings_of
from keelwright.training.losses import Forward, answer_loss
from keelwright.training.memory import Copies
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.rows import EncodedRow, batch_of
from keelwright.training.setup import Setup
from keelwright.training.terms import Anchor, Objective

Labels = Literal["empirical", "sampled"]


@dataclass(frozen=True, slots=True)
class EwcConfig:
    """Settings of elastic weight consolidation."""

    lambda_: float = 1.0
    """Stiffness at a mean Fisher of 1, 0 or more; 0 is plain tuning. Ours: the paper's values do not transfer."""
    labels: Labels = "empirical"
    """`empirical`: the rows' own refusals, deterministic; `sampled`: answers drawn from the model, the true Fisher."""
    fisher_rows: int = 128
    """Safety rows that the Fisher is measured on: the first ones; 0: all. Ours."""

    def __post_init__(self) -> None:
        require_in_range("lambda_", self.lambda_, low=0.0)
        require_in_range("fisher_rows", self.fisher_rows, low=0)
        require_choice("labels", self.labels, get_args(Labels))


def penalty(weights: Sequence[Tensor], start: Sequence[Tensor], fisher: Sequence[Tensor], lambda_: float) -> Tensor:
    """Return `lambda / 2 * sum F (w - w0)^2`, summed in float64. Shape `[]`."""
    parts = [
        (stiffness * (weight.detach() - target).square()).sum().double()
        for weight, target, stiffness in zip(weights, start, fisher, strict=True)
    ]
    return 0.5 * lambda_ * torch.stack(parts).sum()


def fisher_diagonal(setup: Setup, feed: str, config: EwcConfig) -> list[Tensor]:
    """Return the diagonal Fisher of whole answers at the present weights, with a mean of 1 over all entries.

    Args:
        setup: The run before its first step.
        feed: Whose rows are measured.
        config: How many rows, and whose answers.

    Raises:
        NumericalError: It is 0 everywhere, or not finite.
    """
    composer, feeds = setup.composer, setup.feeds
    rows = feeds.feeds[feed].rows
    count = min(config.fisher_rows or len(rows), len(rows))
    total: Gradient = [None] * len(composer.weights)
    trace = 0.0
    for index in range(count):
        batch = feeds.batch(feed, [index])
        if config.labels == "sampled":
            row = sampled_answer(setup.live(), rows[index], feeds.device, seed=setup.config.seed, place=index)
            batch = batch_of([row], pad_id=feeds.pad_id, indices=[index]).to(feeds.device)
        # Every process takes every row, a share of it each: squares must be of one whole row.
        share = composer.forward(answer_loss, batch, key=("fisher", index)) / feeds.processes
        gradient = composer.processes.reduce(composer.processes.gradient(share, composer.weights))
        trace += float(composer.norm(gradient)) ** 2
        total = add_scaled(total, [None if one is None else one.float().square() for one in gradient])
    mean = trace / sum(weight.numel() for weight in composer.weights)
    if not 0.0 < mean < float("inf"):
        raise NumericalError(
            "The Fisher information of the safety rows cannot be normalised.",
            expected="a finite number above 0 as its mean",
            found=f"{mean / count} over {count} rows",
            fix="look at the safety rows and check the model's weights",
        )
    return [
        torch.zeros_like(weight, dtype=torch.float32) if one is None else one / mean
        for weight, one in zip(composer.weights, total, strict=True)
    ]


def sampled_answer(model: Forward, row: EncodedRow, device: torch.device, *, seed: int, place: int) -> EncodedRow:
    """Return the row with an answer drawn from the model: until its end token, at most as long as the row's own.

    Args:
        model: Is asked without gradients.
        row: Prompt, answer and end token.
        device: Of the model.
        seed, place: Key the draw.
    """
    rng = generator(seed, "ewc", "answer", place)
    ids = row.ids[: row.prompt_tokens]
    for _ in range(row.answer_tokens):
        asked = ids[None].to(device)
        logits = model(input_ids=asked, attention_mask=torch.ones_like(asked), use_cache=False).logits[0, -1]
        drawn = torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=rng)
        ids = torch.cat([ids, drawn])
        if int(drawn) == int(row.ids[-1]):
            break
    return EncodedRow(ids, row.prompt_tokens)


@dataclass
class EwcObjective(Objective):
    """The user's rows, and springs to the start."""

    config: EwcConfig = EwcConfig()

    def begin(self, setup: Setup) -> None:
        """Measure the Fisher and keep the weights.

        Raises:
            ConfigError: A new adapter is trained.
        """
        self._anchors: tuple[Anchor, ...] = ()
        self._fisher: list[Tensor] = []
        if not self.config.lambda_:
            return
        _require_no_new_adapter(setup.adapter is not None)
        self._fisher = fisher_diagonal(setup, "safety", self.config)
        start = [weight.detach().clone() for weight in setup.composer.weights]
        self._anchors = (Anchor(start, self.config.lambda_, self._fisher),)
        self._weights = setup.composer.weights

    def anchors(self, step: int) -> Sequence[Anchor]:
        """Return the springs."""
        for anchor in self._anchors:
            self.figures["penalty"] = float(penalty(self._weights, anchor.target, self._fisher, anchor.strength))
        return self._anchors


def _require_no_new_adapter(has_new: bool) -> None:
    if has_new:
        raise ConfigError(
            "EWC cannot hold a new LoRA adapter.",
            expected="trained weights that refusals depend on: lora_rank 0, or an adapter that was trained before",
            found="a new adapter, whose second factor is 0, so that the Fisher of its first factor is exactly 0",
            fix="set lora_rank to 0, or use 'kl_reference', which needs no Fisher",
        )


@dataclass(frozen=True, slots=True)
class Ewc:
    """EWC as a defence of the tuning stage."""

    config: EwcConfig = EwcConfig()

    config_class: ClassVar[type[EwcConfig]] = EwcConfig
    stage: ClassVar[Stage] = "tuning"
    roles: ClassVar[tuple[str, ...]] = ("safety",)
    copies: ClassVar[Copies] = Copies(weights=2)

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the user's run.

        Raises:
            ConfigError: A new adapter would be trained.
        """
        who = "The defence 'ewc'"
        feeds = {"user": Feed(rows.require("user", who=who))}
        if self.config.lambda_:
            feeds["safety"] = Feed(rows.require("safety", who=who))
            _require_no_new_adapter(train.lora_rank > 0)
        return Recipe(feeds, train, EwcObjective(config=self.config), settings_of("ewc", self.config))

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN
