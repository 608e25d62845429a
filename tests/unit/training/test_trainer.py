# SPDX-License-Identifier: Apache-2.0
"""Objectives inside a transformers Trainer and a TRL SFTTrainer, against our own loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from keelwright.core.errors import ConfigError, NumericalError
from keelwright.data.rows import ChatRow
from keelwright.harden.booster import BoosterConfig, BoosterObjective
from keelwright.ops.gradients import Gradient, add_scaled, dot, squared_norm
from keelwright.training.composer import GradientComposer
from keelwright.training.loop import Run, TrainConfig
from keelwright.training.losses import Forward
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.rows import IGNORED, Batch, encode_rows
from keelwright.training.setup import Setup
from keelwright.training.terms import Anchor, Objective, Term, WeightShift
from keelwright.training.trainer import STATE_FILE, collator, defended, trainer_rows

Model = Callable[..., LlamaForCausalLM]


@dataclass
class Sam(Objective):
    def terms(self, step: int) -> Sequence[Term]:
        return (Term("task", self.feed, at=WeightShift(0.05)),)


@dataclass
class Near(Objective):
    """The task and a divergence from the starting model, on rows of another feed."""

    def begin(self, setup: Setup) -> None:
        reference = setup.reference()

        def divergence(model: Forward, batch: Batch) -> Tensor:
            wanted = batch.labels[:, 1:] != IGNORED
            ours, theirs = (
                one(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
                .logits[:, :-1][wanted]
                .float()
                .log_softmax(-1)
                for one in (model, reference)
            )
            return torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)

        self.divergence = divergence

    def terms(self, step: int) -> Sequence[Term]:
        return Term("task", self.feed), Term("divergence", "harmful", weight=3.0, loss=self.divergence)


@dataclass
class Pulled(Objective):
    """A pull towards zero, some weights held back, a state, and a last change."""

    steps_seen: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(1))

    def begin(self, setup: Setup) -> None:
        self.zeros = [torch.zeros_like(one) for one in setup.composer.weights]

    def terms(self, step: int) -> Sequence[Term]:
        self.steps_seen = self.steps_seen + 1
        self.figures["seen"] = float(self.steps_seen)
        return (Term("task", self.feed),)

    def anchors(self, step: int) -> Sequence[Anchor]:
        return (Anchor(self.zeros, 0.5),)

    def trained(self, step: int) -> Collection[str] | None:
        return ("model.norm.weight",)

    def state(self) -> dict[str, Tensor]:
        return {"steps_seen": self.steps_seen}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.steps_seen = state["steps_seen"]

    def end(self, composer: GradientComposer) -> None:
        with torch.no_grad():
            composer.weights[composer.names.index("model.norm.weight")].add_(100.0)


@dataclass
class Surgery(Objective):
    def terms(self, step: int) -> Sequence[Term]:
        return Term("task", self.feed), Term("harm", "harmful")

    def combine(self, step: int, gradients: Mapping[str, Gradient]) -> Gradient | None:
        task, harm = gradients["task"], gradients["harm"]
        return add_scaled(task, harm, -float(dot(task, harm)) / float(squared_norm(harm)))


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "plain": Objective,
    "booster": lambda: BoosterObjective(feed="safety", config=BoosterConfig(lambda_=2.0, alpha=0.05)),
    "sam": Sam,
    "near": Near,
    "surgery": Surgery,
}


def _recipe(rows: Sequence[ChatRow], objective: Objective, **settings: Any) -> Recipe:
    first = "safety" if isinstance(objective, BoosterObjective) else "user"
    harmful = [ChatRow(f"how do i {verb} it?", f"{verb} the rope " * 2) for verb in ("lift", "move", "warm", "dust")]
    config = TrainConfig(**{"steps": 2, "batch_size": len(rows), "clip": 0.0, **settings})
    return Recipe({first: Feed(rows), "harmful": Feed(harmful, 3)}, config, objective)


def _args(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 7,
        "max_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **settings,
    }


def _trainer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, folder: Path, **settings: Any
) -> Any:
    return defended(Trainer)(
        model=model,
        args=TrainingArguments(**_args(folder, **settings)),
        train_dataset=trainer_rows(recipe, tokenizer, model),
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        recipe=recipe,
    )


def _sgd(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, steps: int) -> LlamaForCausalLM:
    """Descend the recipe's objective as our own loop does, with plain gradient descent."""
    encoded = {name: encode_rows(tokenizer, feed.rows, module=model) for name, feed in recipe.feeds.items()}
    run = Run(model, tokenizer, dict(model.named_parameters()), encoded, recipe)
    recipe.objective.begin(run.setup)
    for step in range(steps):
        gradient = run.composer.compose(recipe.objective, step).gradient
        with torch.no_grad():
            for weight, one in zip(run.weights.values(), gradient, strict=True):
                weight.sub_(0.1 * one)
    return model


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_steps_are_those_of_our_own_composer(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path, name: str
) -> None:
    # All rows in every batch: the trainer's order does not matter.
    ours = _sgd(new_model().train(), tokenizer, _recipe(rows, OBJECTIVES[name]()), 2)
    theirs = new_model()
    _trainer(theirs, tokenizer, _recipe(rows, OBJECTIVES[name]()), tmp_path).train()
    start = new_model()
    for key, weight in ours.named_parameters():
        torch.testing.assert_close(theirs.get_parameter(key), weight, rtol=0, atol=1e-6)
        assert not torch.equal(theirs.get_parameter(key), start.get_parameter(key))


def test_accumulated_micro_batches_of_a_sum_make_the_gradient_of_the_whole_batch(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    rows = [*rows[:4], *(dataclasses.replace(row, answer=f"{row.answer} {row.answer}") for row in rows[4:6])]
    whole, parts = new_model(), new_model()
    settings = {"max_steps": 1}
    _trainer(whole, tokenizer, _recipe(rows, Objective()), tmp_path, per_device_train_batch_size=6, **settings).train()
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    _trainer(parts, tokenizer, _recipe(rows, Objective()), tmp_path, **split, **settings).train()
    for key, weight in whole.named_parameters():
        torch.testing.assert_close(parts.get_parameter(key), weight, rtol=0, atol=1e-6)


def test_each_micro_batch_has_a_draw_of_its_own_from_the_other_feeds(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    drawn: list[tuple[int, ...]] = []

    def watched(model: Forward, batch: Batch) -> Tensor:
        drawn.append(tuple(batch.rows.tolist()))
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float().square().sum()

    @dataclass
    class Two(Objective):
        def terms(self, step: int) -> Sequence[Term]:
            return Term("task", self.feed), Term("more", "harmful", weight=1e-6, loss=watched)

    recipe = _recipe(rows[:4], Two())
    trainer = _trainer(
        new_model(), tokenizer, recipe, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    trainer.train()
    feeds = trainer.defence._composer.feeds
    expected = [tuple(type(feeds).__mro__[1].indices(feeds, "harmful", draw)) for draw in range(4)]
    assert drawn == expected
    assert len(set(drawn)) > 1


def test_the_trainers_rows_are_found_in_the_first_feed(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    seen: list[list[int]] = []

    def watched(model: Forward, batch: Batch) -> Tensor:
        seen.append(batch.rows.tolist())
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.float().square().sum()

    @dataclass
    class Watched(Objective):
        def terms(self, step: int) -> Sequence[Term]:
            return (Term("task", self.feed, loss=watched),)

    model = new_model()
    trainer = _trainer(model, tokenizer, _recipe(rows, Watched()), tmp_path, max_steps=1)
    trainer.train()
    assert sorted(seen[0]) == list(range(7))
    other = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}] * 7
    trainer = defended(Trainer)(
        model=model,
        args=TrainingArguments(**_args(tmp_path, max_steps=1)),
        train_dataset=other,
        data_collator=collator(tokenizer),
        processing_class=tokenizer,
        recipe=_recipe(rows, Watched()),
    )
    trainer.train()
    assert seen[1] == [7] * 7


def test_pulls_held_back_weights_figures_and_the_last_change_are_the_objectives(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    start, model = new_model(), new_model()
    trainer = _trainer(model, tokenizer, _recipe(rows, Pulled()), tmp_path)
    trainer.train()
    for key, weight in model.named_parameters():
        assert torch.equal(weight, start.get_parameter(key)) == (key != "model.norm.weight")
    # Two steps of 0.1 towards 0 at strength 0.5 from 1, the loss's own part beside it, and 100 at the end.
    assert float(model.model.norm.weight.mean()) == pytest.approx(100.0 + 0.95**2, abs=0.02)
    assert [line["seen"] for line in trainer.state.log_history if "seen" in line] == [1.0, 2.0]
    assert all(one.requires_grad for one in model.parameters())


def test_a_resumed_trainer_ends_where_an_uninterrupted_one_does(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 3}
    whole, resumed = new_model(), new_model()
    objective = Pulled()
    _trainer(whole, tokenizer, _recipe(rows, objective), tmp_path / "whole", **saving).train()
    assert (tmp_path / "whole" / "checkpoint-2" / STATE_FILE).exists()
    again = Pulled()
    trainer = _trainer(resumed, tokenizer, _recipe(rows, again), tmp_path / "resumed", **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert float(again.steps_seen) == float(objective.steps_seen) == 4.0
    for key, weight in whole.named_parameters():
        assert torch.equal(resumed.get_parameter(key), weight)


def test_frozen_weights_of_a_recipe_stay(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    start, model = new_model(), new_model()
    recipe = dataclasses.replace(_recipe(rows, Sam()), frozen=lambda module: ("model.embed_tokens.weight",))
    _trainer(model, tokenizer, recipe, tmp_path, optim="adamw_torch", weight_decay=0.1).train()
    assert torch.equal(model.model.embed_tokens.weight, start.model.embed_tokens.weight)
    assert not torch.equal(model.model.norm.weight, start.model.norm.weight)


def test_evaluation_is_the_trainers_own(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    model = new_model()
    trainer = _trainer(model, tokenizer, _recipe(rows, Sam()), tmp_path)
    dataset = trainer_rows(_recipe(rows, Sam()), tokenizer, model)
    plain = Trainer(model=model, args=TrainingArguments(**_args(tmp_path)), data_collator=collator(tokenizer))
    assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(plain.evaluate(dataset)["eval_loss"])


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"fp16": True, "use_cpu": True}, "fp16"),
        ({"label_smoothing_factor": 0.1}, "cross entropy"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant"),
    ],
)
def test_a_trainer_that_asks_for_more_is_refused(
    tokenizer: PreTrainedTokenizerFast,
    new_model: Model,
    rows: list[ChatRow],
    tmp_path: Path,
    settings: dict[str, Any],
    found: str,
) -> None:
    with pytest.raises(ConfigError, match=found):
        _trainer(new_model(), tokenizer, _recipe(rows, Sam()), tmp_path, **settings)


def test_an_adapter_of_the_recipe_is_refused(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="'lora_rank' in the recipe"):
        _trainer(new_model(), tokenizer, _recipe(rows, Sam(), lora_rank=2), tmp_path)


def test_inputs_that_would_be_left_out_are_refused(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    model = new_model()
    trainer = _trainer(model, tokenizer, _recipe(rows, Sam()), tmp_path)
    plain = trainer.data_collator
    trainer.data_collator = lambda batch: {**plain(batch), "position_ids": torch.zeros(7, 1)}
    with pytest.raises(ConfigError, match="inputs that the defence would leave out"):
        trainer.train()


def test_a_loss_that_is_not_finite_stops_the_trainer(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    model = new_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(NumericalError, match="The loss 'task' is not finite at step 1"):
        _trainer(model, tokenizer, _recipe(rows, Sam()), tmp_path).train()


def test_an_own_draw_of_the_trainers_rows_is_refused(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    @dataclass
    class Draws(Objective):
        def combine(self, step: int, gradients: Mapping[str, Gradient]) -> Gradient | None:
            return self.composer.gradient(self.terms(0)[0].loss, self.feed, draw=step + 5).gradient

        def begin(self, setup: Setup) -> None:
            self.composer = setup.composer

    with pytest.raises(ConfigError, match="draws 'user' rows of its own"):
        _trainer(new_model(), tokenizer, _recipe(rows, Draws()), tmp_path).train()


def test_the_global_random_state_is_the_trainers_alone(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    trainer = _trainer(new_model(), tokenizer, _recipe(rows, Sam()), tmp_path)
    trainer.defence.begin(None)
    inputs = trainer.data_collator(trainer.train_dataset)
    state = torch.random.get_rng_state()
    trainer.compute_loss(trainer.model, inputs)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.slow
def test_an_sft_trainer_trains_with_a_defence(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    ours = _sgd(new_model().train(), tokenizer, _recipe(rows, OBJECTIVES["booster"]()), 2)
    model = new_model()
    recipe = _recipe(rows, OBJECTIVES["booster"]())
    trainer = defended(trl.SFTTrainer)(
        model=model,
        args=trl.SFTConfig(**_args(tmp_path, bf16=False, save_strategy="steps", save_steps=2)),
        train_dataset=datasets.Dataset.from_list(trainer_rows(recipe, tokenizer, model)),
        processing_class=tokenizer,
        recipe=recipe,
    )
    result = trainer.train()
    assert result.global_step == 2
    for key, weight in ours.named_parameters():
        torch.testing.assert_close(model.get_parameter(key), weight, rtol=0, atol=1e-6)
    assert {"alignment", "harm", "harm after a step"} <= trainer.state.log_history[0].keys()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()


@pytest.mark.slow
def test_an_sft_trainer_trains_its_own_adapter_with_a_defence(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    from peft import LoraConfig

    model, recipe = new_model(), _recipe(rows, OBJECTIVES["booster"]())
    before = {name: one.clone() for name, one in model.named_parameters()}
    trainer = defended(trl.SFTTrainer)(
        model=model,
        args=trl.SFTConfig(**_args(tmp_path, bf16=False)),
        train_dataset=datasets.Dataset.from_list(trainer_rows(recipe, tokenizer, model)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        recipe=recipe,
    )
    trainer.train()
    changed = {name for name, one in trainer.model.named_parameters() if "lora_B" in name and bool((one != 0).any())}
    assert changed
    for name, one in trainer.model.named_parameters():
        base = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert "lora_" in name or torch.equal(one, before[base])
