# SPDX-License-Identifier: Apache-2.0
"""SEAL: learn which of the user's rows do not fit safety, and tune without them.

For a provider who tunes a model on rows that a user sent. A weight per row is learned beside a copy of the model that
is kept safe: rows that stay hard for it lose weight. Then the rows with the highest weights are tuned on as usual.

Source:
    SEAL: Safety-enhanced Aligned LLM Fine-tuning via Bilevel Data Selection, arXiv 2410.07471 (ICLR 2025). Official
    code: hanshen95/SEAL, `seal/trainer/sft_selector_trainer.py` (commit 1538e62).

Equation:
    model:    w <- step on ul * mean_j f_j + (1 - ul) * mean_i p_i u_i
    selector: z <- step on mean_i p_i * u_i, u_i held fixed;   p = n softmax(z), or 2 sigmoid(z)

    | symbol | name |
    |---|---|
    | f_j | mean cross entropy of an alignment row: roles `safety`, `borderline`, `ordinary` |
    | u_i | mean cross entropy of one of the n user's rows |
    | ul | `safe_weight`, less by `safe_weight_decay` after every pass over the user's rows |
    | p | `Selection.weights` |

Differs from the official code:
    Weights are drawn from all processes' rows alike. Rows of equal weight are kept in their order (there: any). The
    selection leaves the model as it was. The selector's gradient is not clipped (Adam's steps do not depend on its
    size).

Cost:
    Selection: one forward and backward pass on alignment rows and one on user rows per step (a forward pass alone while
    `ul` is 1), for `epochs` passes over the user's rows. Then plain tuning.

Limits:
    It needs a model that is safe to begin with, and alignment rows like what the user may ask for: a user's rows on a
    task that they do not cover are as hard as harmful ones, and lose weight too. The share that is kept is a setting.
    A user whose rows are all harmful is tuned on the least hard of them. Of 10 bad rows in 500 the lab's selections
    keep 0 to 2, and 2 still do harm (.21).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.digests import json_digest
from keelwright.core.errors import ConfigError, DataError
from keelwright.core.protocols import Progress
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.ops.gradients import scaled
from keelwright.training.composer import GradientComposer, Taken
from keelwright.training.config import TrainConfig, steps_of
from keelwright.training.defence import Stage, settings_of
from keelwright.training.loop import train as train_model
from keelwright.training.losses import Forward
from keelwright.training.paired_rows import slots
from keelwright.training.recipe import Feed, Recipe, plain_recipe
from keelwright.training.reference import answer_losses
from keelwright.training.rows import IGNORED, Batch
from keelwright.training.setup import Setup
from keelwright.training.terms import Objective, Term

Activation = Literal["softmax", "sigmoid"]

_START: Mapping[Activation, float] = {"softmax": 0.1, "sigmoid": -1e-4}
"""What z is at first, as in the official code: all weights are 1, or nearly."""


@dataclass(frozen=True, slots=True)
class SealConfig:
    """Settings of SEAL."""

    keep: float = 0.8
    """Share of the user's rows that are tuned on, above 0, at most 1; rounded down, at least one. The scripts: 0.8."""
    epochs: float = 3.0
    """Passes over the user's rows while weights are learned, above 0. The scripts: 3."""
    lr: float = 1e-5
    """Learning rate of the model during the selection, constant, above 0. The scripts: 1e-5."""
    selector_lr: float = 5e-3
    """Learning rate of the weights, above 0. The scripts: 5e-3."""
    safe_weight: float = 1.0
    """ul at first, 0 to 1. The scripts: 1."""
    safe_weight_decay: float = 0.03
    """How much less ul is after each pass, 0 to 1; it stops at 0. The scripts: 0.03."""
    activation: Activation = "softmax"
    """How weights come of z: `softmax` weighs rows against each other, `sigmoid` each alone. The scripts: softmax."""
    batch_size: int = 64
    """Rows of each kind per step of the selection, at least 1. The scripts: 64."""
    lora_rank: int = 16
    """Rank of the adapter that is trained during the selection and thrown away; 0 trains a model whose weights are put
    back. The scripts: 16, on `q_proj` and `v_proj` alone."""

    def __post_init__(self) -> None:
        for name in ("keep", "epochs", "lr", "selector_lr"):
            require_in_range(name, getattr(self, name), low=0.0, low_open=True)
        require_in_range("keep", self.keep, high=1.0)
        for name in ("safe_weight", "safe_weight_decay"):
            require_in_range(name, getattr(self, name), low=0.0, high=1.0)
        require_in_range("batch_size", self.batch_size, low=1)
        require_in_range("lora_rank", self.lora_rank, low=0)
        require_choice("activation", self.activation, get_args(Activation))


@dataclass(frozen=True, slots=True)
class Selection:
    """What was learned of the user's rows."""

    weights: tuple[float, ...]
    """p of each row; higher is more like safe rows. Their mean is 1 under `softmax`."""
    kept: tuple[int, ...]
    """Rows with the highest weights, in the order of the file."""
    digest: str
    """Of the rows that were weighed."""


def row_weights(z: Float[Tensor, " rows"], activation: Activation) -> Float[Tensor, " rows"]:
    """Return p: `n softmax(z)` or `2 sigmoid(z)`; 1 each where all of z are equal, or 0."""
    return len(z) * torch.softmax(z, dim=0) if activation == "softmax" else 2.0 * torch.sigmoid(z)


def kept_rows(weights: Sequence[float], share: float) -> tuple[int, ...]:
    """Return the share of the rows with the highest weights, in their order; of equal ones the first."""
    order = sorted(range(len(weights)), key=lambda row: (-weights[row], row))
    return tuple(sorted(order[: max(1, int(share * len(weights)))]))


def safe_weight_at(config: SealConfig, step: int, rows: int) -> float:
    """Return ul at a step, counted from 0; it falls when a pass over the user's rows is complete."""
    return max(0.0, config.safe_weight - config.safe_weight_decay * (step * config.batch_size // rows))


def row_means(model: Forward, batch: Batch) -> Float[Tensor, " batch"]:
    """Return the mean cross entropy of each row's answer, in nats per token and float32."""
    wanted = batch.labels[:, 1:] != IGNORED
    row = torch.arange(len(wanted), device=wanted.device)[:, None].expand_as(wanted)[wanted]
    losses = answer_losses(model, batch)
    return losses.new_zeros(len(wanted)).index_add(0, row, losses) / wanted.sum(dim=1)


def summed_row_means(model: Forward, batch: Batch) -> Tensor:
    """Return the mean cross entropies of a micro-batch's rows, summed over rows."""
    return row_means(model, batch).sum()


@dataclass(frozen=True, slots=True, eq=False)
class Weighed:
    """The place of the user's rows: their weighted loss, and what it teaches the weights."""

    objective: SealObjective
    share: float
    """1 - ul; at 0 no gradient is taken."""

    def gradient(self, composer: GradientComposer, term: Term) -> Taken:
        """Return `mean p u` and `(1 - ul)` times its gradient; the weights take their step."""
        feeds, ours = composer.feeds, self.objective
        picked = feeds.indices(term.feed, composer.step)
        weights = ours.weights().to(feeds.device)
        seen = torch.zeros(len(picked), device=feeds.device)

        def loss(model: Forward, batch: Batch) -> Tensor:
            losses = row_means(model, batch)
            means.append(losses.detach())
            return (weights[batch.rows] * losses).sum()

        means: list[Tensor] = []
        with torch.set_grad_enabled(self.share > 0.0):
            shares = composer.shares(loss, term.feed, per="row")
            if self.share > 0.0:
                taken = composer.harvest(shares)
            else:
                taken = Taken(torch.stack(list(shares)).sum(), [None] * len(composer.weights))
        for places, values in zip(slots(feeds, term.feed), means, strict=True):
            seen[places] = values
        ours.learn(picked, composer.processes.sum(seen))
        return Taken(taken.value, scaled(taken.gradient, self.share))


@dataclass
class SealObjective(Objective):
    """A model kept safe, and a weight per user's row that learns from it."""

    config: SealConfig = SealConfig()
    rows: int = 1
    """n."""
    z: Tensor = field(init=False)
    _optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        """Start with equal weights."""
        self.z = torch.full((self.rows,), _START[self.config.activation], requires_grad=True)
        self._optimizer = torch.optim.AdamW(
            [self.z], lr=self.config.selector_lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=False
        )

    def begin(self, setup: Setup) -> None:
        """Check that every user's row has a weight.

        Raises:
            DataError: Some of them were too long and left out.
        """
        found = len(setup.feeds.feeds["user"].rows)
        if found != self.rows:
            raise DataError(
                "The defence 'seal' weighs every user's row, and some are too long for the model.",
                expected=f"{self.rows} rows that fit",
                found=f"{found}",
                fix="set too_long to 'cut', or shorten the rows",
            )

    def terms(self, step: int) -> Sequence[Term]:
        """Return safety, and the weighed rows of the user."""
        weight = safe_weight_at(self.config, step, self.rows)
        return (
            Term("safe", "alignment", weight=weight, loss=summed_row_means, per="row"),
            Term("weighed", "user", per="row", at=Weighed(self, 1.0 - weight)),
        )

    def weights(self) -> Float[Tensor, " rows"]:
        """Return p."""
        return row_weights(self.z.detach(), self.config.activation)

    def learn(self, rows: Sequence[int], losses: Float[Tensor, " batch"]) -> None:
        """Take one step of the selector.

        Args:
            rows: The user's rows of the step, over all processes.
            losses: u of each.
        """
        weights = row_weights(self.z, self.config.activation)[torch.tensor(rows)]
        (self.z.grad,) = torch.autograd.grad((weights * losses.cpu()).mean(), self.z)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.figures["lowest weight"] = float(self.weights().min())
        self.figures["highest weight"] = float(self.weights().max())

    def state(self) -> dict[str, Tensor]:
        """Return z and its moments."""
        return {"z": self.z.detach(), **dict(self._optimizer.state[self.z])}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take z and its moments."""
        with torch.no_grad():
            self.z.copy_(state["z"])
        self._optimizer.state[self.z] = {name: one.clone() for name, one in state.items() if name != "z"}


@dataclass(frozen=True, slots=True)
class Seal:
    """SEAL as a defence of the tuning stage."""

    config: SealConfig = SealConfig()
    selection: Selection | None = None
    """What `prepare` learned."""

    config_class: ClassVar[type[SealConfig]] = SealConfig
    stage: ClassVar[Stage] = "tuning"
    roles: ClassVar[tuple[str, ...]] = ("safety",)

    def prepare(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: RowSets,
        train: TrainConfig,
        *,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> Seal:
        """Return the defence with the user's rows weighed; the model is as before afterwards.

        Args:
            module: The aligned model.
            tokenizer: Of the model.
            rows: By role.
            train: Of the tuning that follows: its seed, precision and rule for long rows hold here too.
            folder: Where checkpoints of the selection go.
            progress: Told about each step.
        """
        selection = select(module, tokenizer, rows, self.config, train, folder=folder, progress=progress)
        return dataclasses.replace(self, selection=selection)

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return plain tuning on the kept rows.

        Raises:
            ConfigError: `prepare` was not called.
            DataError: It was called with other rows of the user.
        """
        user = rows.require("user", who="The defence 'seal'")
        if self.selection is None:
            raise ConfigError(
                "The defence 'seal' has not weighed the user's rows yet.",
                expected="the defence that 'prepare' returns",
                found="one without a selection",
                fix="call prepare(module, tokenizer, rows, train) first",
            )
        if self.selection.digest != _digest(user):
            raise DataError(
                "The defence 'seal' weighed other rows than these.",
                expected=f"{len(self.selection.weights)} rows with the digest {self.selection.digest}",
                found=f"{len(user)} rows with the digest {_digest(user)}",
                fix="call 'prepare' with these rows",
            )
        kept = [user[row] for row in self.selection.kept]
        settings = {**settings_of("seal", self.config), "kept": json_digest(list(self.selection.kept))}
        return dataclasses.replace(plain_recipe(kept, train), settings=settings)

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN


def select(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: RowSets,
    config: SealConfig,
    train: TrainConfig,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Weigh the user's rows; the model is as before afterwards.

    Args:
        module: The aligned model.
        tokenizer: Of the model.
        rows: By role: the user's, and refusals, with whatever there is of answered requests.
        config: Of the selection.
        train: Seed, precision, accumulation and rule for long rows; steps and rates are the selection's own.
        folder: Where checkpoints go. The same call on the same folder resumes.
        progress: Told about each step.
    """
    who = "The defence 'seal'"
    user = rows.require("user", who=who)
    own = dataclasses.replace(
        train,
        steps=steps_of(config.epochs, len(user), config.batch_size),
        batch_size=config.batch_size,
        lr=config.lr,
        schedule="constant",
        warmup_steps=0,
        lora_rank=config.lora_rank,
        lora_alpha=float(config.lora_rank),
    )
    objective = SealObjective(config=config, rows=len(user))
    feeds = {"user": Feed(user), "alignment": Feed(rows.alignment(who=who))}
    recipe = Recipe(feeds, own, objective, {**settings_of("seal", config), "part": "selection"})
    before = [] if config.lora_rank else [(one, one.detach().clone()) for one in module.parameters()]
    try:
        result = train_model(module, tokenizer, recipe, folder=folder, progress=progress)
        if result.adapter is not None:
            result.adapter.detach()
    finally:
        with torch.no_grad():
            for weight, value in before:
                weight.copy_(value)
    weights = tuple(objective.weights().tolist())
    return Selection(weights, kept_rows(weights, config.keep), _digest(user))


def _digest(rows: Sequence[ChatRow]) -> str:
    return json_digest([[row.prompt, row.answer, row.system] for row in rows])
