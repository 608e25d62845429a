# SPDX-License-Identifier: Apache-2.0
"""Defences inside a transformers `Trainer` or a TRL `SFTTrainer`.

For whoever trains with one of these already. Our own loop (`training.loop.train`) needs no trainer, runs on several
processes and is resumable to the bit.

    from trl import SFTTrainer
    recipe = Booster().recipe(row_sets, TrainConfig(batch_size=20))
    rows = Dataset.from_list(trainer_rows(recipe, tokenizer, module))
    trainer = defended(SFTTrainer)(module, args, train_dataset=rows, processing_class=tokenizer, recipe=recipe)
    trainer.train()

The trainer's own batches take the place of the recipe's first feed; all other feeds are drawn here, from the recipe.
Rates, steps, clipping and the optimiser are the trainer's. Only public hooks are used: `compute_loss`, `train`, `log`
and callbacks.

How: `compute_loss` has the gradient composer take the gradient of the step, and returns a scalar whose value is the
first term's loss and whose backward pass hands exactly that gradient to the weights.

With gradient accumulation each micro-batch composes a gradient of its own, with a draw of its own from the other feeds,
and the step is their mean, weighted by answer tokens as the trainer weights its loss. For sums of losses at the weights
that is the gradient of the whole batch. Where a norm or a product stands between (Booster, SAM, surgery), it is taken
per micro-batch: another estimate of the same thing. Our own loop takes it over the whole step.

Cost: that of the objective; the trainer's own forward pass is not made on top.
Limits: one process and one device; float32 or bfloat16; cross entropy on the labels (no label smoothing, loss
functions of the trainer's user, packing, or inputs beside ids, mask and labels). Rows that are not the first feed's own
have an index beyond it. TRL's entropy and token accuracy are not logged. A new adapter is the trainer's `peft_config`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from keelwright.core.errors import ConfigError, NumericalError
from keelwright.ops.gradients import Gradient, scaled
from keelwright.training.composer import GradientComposer
from keelwright.training.feeds import EncodedFeed, Feeds, feed_seed
from keelwright.training.processes import Replicated
from keelwright.training.recipe import Recipe
from keelwright.training.rows import IGNORED, Batch, EncodedRow, batch_of, fit_rows
from keelwright.training.setup import Setup

STATE_FILE: Final = "keelwright_objective.safetensors"
"""In the trainer's checkpoints: what the objective keeps."""
_KNOWN_INPUTS: Final = {"input_ids", "attention_mask", "labels"}


def defended(trainer_class: type) -> type:
    """Return a trainer that takes one more argument, `recipe`, and descends its objective.

    Args:
        trainer_class: `transformers.Trainer`, `trl.SFTTrainer`, or a subclass that leaves `compute_loss` as it is.
    """
    return type(f"Defended{trainer_class.__name__}", (DefendedTraining, trainer_class), {})


def trainer_rows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, module: PreTrainedModel) -> list[dict[str, Any]]:
    """Return the recipe's first feed as a trainer's data set: `input_ids` and `labels`, prompts masked out.

    Raises:
        DataError: A row does not fit the model.
    """
    name, feed = next(iter(recipe.feeds.items()))
    rows = fit_rows(tokenizer, feed.rows, module=module, too_long=recipe.config.too_long, name=name).rows
    return [
        {"input_ids": row.ids.tolist(), "labels": [IGNORED] * row.prompt_tokens + row.ids[row.prompt_tokens :].tolist()}
        for row in rows
    ]


def collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
    """Return a `data_collator` for `trainer_rows`; TRL has its own."""
    pad_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        encoded = [
            EncodedRow(torch.as_tensor(row["input_ids"]), sum(one == IGNORED for one in row["labels"])) for row in rows
        ]
        batch = batch_of(encoded, pad_id=pad_id)
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    return collate


class DefendedTraining:
    """What `defended` puts before a trainer's class."""

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.defence = TrainerDefence(self, recipe)
        cast("Any", self).add_callback(_Steps(self.defence))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; the objective measures the weights before a checkpoint is read, as in our own loop."""
        self.defence.begin(resume_from_checkpoint)
        try:
            return cast("Any", super()).train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.defence.close()

    def compute_loss(
        self,
        model: Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the first term's loss, whose backward pass is the composed gradient; in evaluation the trainer's."""
        if return_outputs or not torch.is_grad_enabled() or not self.defence.running:
            return cast("Any", super()).compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Says that the loss is divided by the tokens of all micro-batches already, where it is.
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        return self.defence.loss(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the terms' losses and the objective's figures as well."""
        more = self.defence.figures if "loss" in logs else {}
        cast("Any", super()).log({**logs, **more}, *args, **kwargs)


class TrainerDefence:
    """An objective between a trainer and its weights.

    Args:
        trainer: As it was made; read only.
        recipe: Feeds and objective.

    Raises:
        ConfigError: The trainer asks for something that this does not support.
    """

    def __init__(self, trainer: Any, recipe: Recipe) -> None:
        _require_supported(trainer, recipe)
        self._trainer, self.recipe = trainer, recipe
        self.running = False
        self.figures: dict[str, float] = {}
        self._flags: dict[str, bool] = {}

    def begin(self, resume: str | bool | None) -> None:
        """Measure the starting weights, and read the objective's state where a checkpoint is resumed."""
        trainer, recipe = self._trainer, self.recipe
        module = trainer.accelerator.unwrap_model(trainer.model)
        self._flags = {name: one.requires_grad for name, one in module.named_parameters()}
        for name in recipe.frozen(module):
            module.get_parameter(name).requires_grad_(False)
        weights = {name: one for name, one in module.named_parameters() if one.requires_grad}
        self._place = _Place(parts=trainer.args.gradient_accumulation_steps)
        feeds = _feeds(trainer.processing_class, module, recipe, self._place)
        processes = Replicated(Accelerator(device_placement=False))
        self._composer = GradientComposer(module, weights, feeds, processes, seed=recipe.config.seed)
        self._places = {tuple(row.ids.tolist()): place for place, row in enumerate(feeds.feeds[feeds.first].rows)}
        recipe.objective.begin(
            Setup(module, trainer.processing_class, feeds, recipe.config, self._composer, adapter=None)
        )
        folder = get_last_checkpoint(trainer.args.output_dir) if resume is True else resume
        if folder and (Path(folder) / STATE_FILE).exists():
            recipe.objective.restore(load_file(Path(folder) / STATE_FILE))
        self.running = True

    def loss(self, model: Module, inputs: Mapping[str, Any], items: Tensor | int | None) -> Tensor:
        """Return one micro-batch's loss.

        Args:
            model: As the trainer calls it.
            inputs: `input_ids`, `labels` and perhaps `attention_mask`.
            items: Answer tokens of all micro-batches of the step; None: the trainer divides by their number.

        Raises:
            NumericalError: A loss is not finite.
        """
        place, step = self._place, self._trainer.state.global_step
        place.batch = self._batch(inputs)
        place.step = step
        self.recipe.objective.figures.clear()
        self._composer.model = model
        devices = [place.batch.input_ids.device] if place.batch.input_ids.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            composed = self._composer.compose(self.recipe.objective, step)
        place.part += 1
        for name, found in composed.losses.items():
            if not math.isfinite(found):
                raise NumericalError(
                    f"The loss '{name}' is not finite at step {step + 1}.",
                    expected="a finite number",
                    found=str(found),
                    fix="lower the learning rate, look at the rows of this step, and check the model's weights",
                )
        self.figures = {**composed.losses, **self.recipe.objective.figures}
        share = 1.0 if items is None else _answer_tokens(place.batch) / float(items)
        value = torch.tensor(next(iter(composed.losses.values())) * share, device=place.batch.input_ids.device)
        return _Descended.apply(value, scaled(composed.gradient, share), *self._composer.weights)

    def new_step(self) -> None:
        """Count micro-batches from 0 again."""
        self._place.part = 0

    def hold_back(self, step: int) -> None:
        """Take the gradient from the weights that the step does not change."""
        wanted = self.recipe.objective.trained(step)
        if wanted is None:
            return
        for name, weight in zip(self._composer.names, self._composer.weights, strict=True):
            if name not in wanted:
                weight.grad = None

    def save(self, folder: Path) -> None:
        """Write the objective's state beside the trainer's checkpoint."""
        state = self.recipe.objective.state()
        if state and folder.is_dir():
            save_file(
                {name: one.detach().cpu().contiguous().clone() for name, one in state.items()}, folder / STATE_FILE
            )

    def end(self) -> None:
        """Let the objective change the weights once more."""
        self.recipe.objective.end(self._composer)

    def close(self) -> None:
        """Put the weights' flags back."""
        self.running = False
        module = self._trainer.accelerator.unwrap_model(self._trainer.model)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(self._flags.get(name, parameter.requires_grad))

    def _batch(self, inputs: Mapping[str, Any]) -> Batch:
        unknown = sorted(set(inputs) - _KNOWN_INPUTS)
        if unknown or "labels" not in inputs:
            raise ConfigError(
                "The trainer's batches hold inputs that the defence would leave out.",
                expected="input_ids, labels and perhaps attention_mask",
                found=", ".join(sorted(inputs)),
                fix="set packing and padding_free to False, and give text rows only",
            )
        ids, labels = inputs["input_ids"], inputs["labels"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        keys = [tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)]
        # Beyond the feed: a method that looks a row up then fails, and does not take another row's value.
        places = [self._places.get(key, len(self._places)) for key in keys]
        return Batch(ids, mask, labels, torch.tensor(places, device=ids.device))


@dataclass
class _Place:
    """Where the trainer stands."""

    parts: int
    """Micro-batches per step."""
    step: int = 0
    part: int = 0
    batch: Batch | None = None
    """The trainer's own rows."""


@dataclass(frozen=True, slots=True)
class TrainerFeeds(Feeds):
    """Feeds of which the first is whatever the trainer has drawn; the others have one draw per micro-batch."""

    first: str = ""
    place: _Place = field(default_factory=lambda: _Place(1))

    def indices(self, feed: str, draw: int) -> list[int]:
        """Return the rows of a draw."""
        if feed != self.first:
            # Not super(): a dataclass with slots is another class than the one that is written here.
            return Feeds.indices(self, feed, draw * self.place.parts + self.place.part)
        return self._now(draw).rows.tolist()

    def count(self, feed: str, draw: int, *, per: str) -> int:
        """Return what the loss of a draw is divided by."""
        if feed != self.first:
            return Feeds.count(self, feed, draw, per=per)
        batch = self._now(draw)
        return len(batch.rows) if per == "row" else _answer_tokens(batch)

    def batches(self, feed: str, draw: int) -> list[Batch]:
        """Return a draw as one batch."""
        return [self._now(draw)] if feed == self.first else Feeds.batches(self, feed, draw)

    def _now(self, draw: int) -> Batch:
        if self.place.batch is None or draw != self.place.step:
            raise ConfigError(
                f"The method draws '{self.first}' rows of its own, and a trainer gives those of the step alone.",
                expected=f"draw {self.place.step}",
                found=f"draw {draw}",
                fix="train with keelwright.training.loop.train",
            )
        return self.place.batch


class _Descended(torch.autograd.Function):
    """A value, and the gradient that its backward pass hands to the weights."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient: Gradient, *weights: Tensor) -> Tensor:
        """Return the value."""
        ctx.gradient = gradient
        ctx.dtypes = [weight.dtype for weight in weights]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        """Return the gradient times what came from above (the trainer's own scale)."""
        found = (
            None if one is None else (upstream[0] * one).to(dtype)
            for one, dtype in zip(ctx.gradient, ctx.dtypes, strict=True)
        )
        return (None, None, *found)


class _Steps(TrainerCallback):
    """Tells the defence where the trainer is."""

    def __init__(self, defence: TrainerDefence) -> None:
        self._defence = defence

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._defence.new_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._defence.hold_back(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._defence.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._defence.end()


def _feeds(tokenizer: PreTrainedTokenizerBase, module: PreTrainedModel, recipe: Recipe, place: _Place) -> TrainerFeeds:
    config, first = recipe.config, next(iter(recipe.feeds))
    feeds = {
        name: EncodedFeed(
            fit_rows(tokenizer, feed.rows, module=module, too_long=config.too_long, name=name).rows,
            feed.batch_size or config.batch_size,
            feed_seed(config.seed, name, first=name == first),
        )
        for name, feed in recipe.feeds.items()
    }
    pad_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    device = next(module.parameters()).device
    return TrainerFeeds(feeds, pad_id=pad_id, device=device, first=first, place=place)


def _answer_tokens(batch: Batch) -> int:
    return int((batch.labels[:, 1:] != IGNORED).sum())


def _require_supported(trainer: Any, recipe: Recipe) -> None:
    args, problem = trainer.args, ""
    kwargs = getattr(args, "gradient_checkpointing_kwargs", None) or {}
    if trainer.accelerator.num_processes > 1 or args.n_gpu > 1:
        problem = f"{max(trainer.accelerator.num_processes, args.n_gpu)} processes or devices"
    elif args.fp16:
        problem = "fp16, whose gradients need a scale that the composed ones do not have"
    elif args.label_smoothing_factor or getattr(trainer, "compute_loss_func", None) is not None:
        problem = "a loss other than cross entropy on the labels"
    elif getattr(args, "loss_type", "nll") not in ("nll", None):
        problem = f"loss_type '{args.loss_type}'"
    elif args.gradient_checkpointing and kwargs.get("use_reentrant"):
        problem = "reentrant gradient checkpointing, which knows `backward` alone"
    elif recipe.config.lora_rank:
        problem = "'lora_rank' in the recipe"
    if problem:
        raise ConfigError(
            "The defence cannot run in this trainer.",
            expected="one device, float32 or bfloat16, cross entropy on the labels, adapters by the trainer",
            found=problem,
            fix="change the trainer's arguments, or train with keelwright.training.loop.train",
        )
