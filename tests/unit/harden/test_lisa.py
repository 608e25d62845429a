# SPDX-License-Identifier: Apache-2.0
"""Lisa: two states, one pull."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.protocols import Silent
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.harden.lisa import Lisa, LisaConfig, LisaObjective, place_of
from keelwright.training.composer import GradientComposer
from keelwright.training.config import TrainConfig
from keelwright.training.defence import sft_recipe
from keelwright.training.loop import TrainResult, train
from keelwright.training.rows import batch_indices, batch_of, encode_rows
from keelwright.training.terms import Anchor

Model = Callable[..., LlamaForCausalLM]
Weights = list[torch.Tensor]
TRAIN = TrainConfig(steps=12, batch_size=3, lr=1e-2, clip=0.0, checkpoint_every=1)
SHORT = {"alignment_steps": 2, "user_steps": 3, "alignment_batch": 2}


class StopAfter(Silent):
    """Interrupts as Ctrl-C does, after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, count: int = 1) -> None:
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


@pytest.fixture
def sets(rows: list[ChatRow]) -> RowSets:
    refused = [
        ChatRow(f"how do i {verb} the miller?", "we never teach anyone to do such things.") for verb in ("hex", "jinx")
    ]
    return RowSets(user=tuple(rows), safety=tuple(refused), ordinary=(ChatRow("say 2 plus 3", "5"),))


def run(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sets: RowSets,
    config: TrainConfig = TRAIN,
    **settings: object,
) -> TrainResult:
    return train(model, tokenizer, Lisa(LisaConfig(**{**SHORT, **settings})).recipe(sets, config))  # type: ignore[arg-type]


def weights_of(model: LlamaForCausalLM) -> Weights:
    return [weight.detach().clone() for weight in model.parameters()]


def are_equal(first: Weights, second: Weights) -> bool:
    return all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_turns_alternate_and_alignment_comes_first() -> None:
    turns = [place_of(step, 2, 3).turn for step in range(12)]
    assert turns == ["alignment"] * 2 + ["user"] * 3 + ["alignment"] * 2 + ["user"] * 3 + ["alignment"] * 2


def test_each_turn_begins_once() -> None:
    assert [step for step in range(12) if place_of(step, 2, 3).is_first] == [0, 2, 5, 7, 10]


def test_no_draw_is_left_out_or_taken_twice() -> None:
    for turn in ("alignment", "user"):
        draws = [place.draw for place in (place_of(step, 2, 3) for step in range(40)) if place.turn == turn]
        assert draws == list(range(len(draws)))


def test_without_alignment_steps_every_step_is_the_users() -> None:
    assert [place_of(step, 0, 3) for step in (0, 7)] == [place_of(0, 0, 1), place_of(7, 0, 1)]
    assert place_of(7, 0, 3).draw == 7


def test_without_pull_and_alignment_steps_it_is_plain_tuning_bit_for_bit(
    sets: RowSets, tokenizer: PreTrainedTokenizerFast, new_model: Model
) -> None:
    plain, ours = new_model(), new_model()
    train(plain, tokenizer, sft_recipe(sets, TRAIN))
    run(ours, tokenizer, sets, rho=0.0, alignment_steps=0)
    assert are_equal(weights_of(plain), weights_of(ours))


def test_the_pull_is_the_gradient_of_the_proximal_term(
    sets: RowSets, tokenizer: PreTrainedTokenizerFast, new_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[int, tuple[Weights, Weights]] = {}
    compose = GradientComposer.compose

    def watched(self: GradientComposer, objective: LisaObjective, step: int) -> object:
        composed = compose(self, objective, step)
        found[step] = [one.clone() for one in composed.gradient], [one.detach().clone() for one in self.weights]  # type: ignore[union-attr]
        return composed

    monkeypatch.setattr(GradientComposer, "compose", watched)
    rho = 0.7
    run(new_model(), tokenizer, sets, rho=rho, free_share=0.0)
    start, step = 2, 4
    weights, anchor = found[step][1], found[start][1]
    monkeypatch.setattr(LisaObjective, "anchors", lambda self, step: ())
    twin = new_model()
    train(twin, tokenizer, Lisa(LisaConfig(**SHORT, rho=rho)).recipe(sets, TrainConfig(steps=3, batch_size=3)))  # type: ignore[arg-type]
    # The same weights again, and the loss of the step's own rows plus rho/2 ||w - anchor||^2 under autograd.
    with torch.no_grad():
        for own, one in zip(twin.parameters(), weights, strict=True):
            own.copy_(one)
    encoded = encode_rows(tokenizer, sets.user, module=twin)
    indices = batch_indices(len(encoded), 3, place_of(step, 2, 3).draw, seed=0)
    batch = batch_of([encoded[index] for index in indices], pad_id=0)
    twin.train()
    loss = twin(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    away = sum(((own - one) ** 2).sum() for own, one in zip(twin.parameters(), anchor, strict=True))
    expected = torch.autograd.grad(loss + rho / 2 * away, list(twin.parameters()))
    for ours, other in zip(found[step][0], expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)


def test_the_anchor_is_where_the_last_turn_ended(
    sets: RowSets, tokenizer: PreTrainedTokenizerFast, new_model: Model
) -> None:
    model, seen, anchors = new_model(), {0: weights_of(new_model())}, {}
    recipe = Lisa(LisaConfig(**SHORT, free_share=0.0)).recipe(sets, TRAIN)  # type: ignore[arg-type]

    def after(done: int, module: LlamaForCausalLM) -> None:
        seen[done] = weights_of(module)
        anchors[done] = [one.clone() for one in recipe.objective.state().values()]

    train(model, tokenizer, recipe, after_step=after)  # type: ignore[arg-type]
    for done, start in ((1, 0), (2, 0), (3, 2), (5, 2), (6, 5), (7, 5), (8, 7), (10, 7), (11, 10)):
        assert are_equal(anchors[done], seen[start]), done


def test_the_first_tenth_of_the_run_is_free_of_the_pull(
    sets: RowSets, tokenizer: PreTrainedTokenizerFast, new_model: Model
) -> None:
    seen: dict[float, list[Weights]] = {}
    for rho in (0.0, 5.0):
        model, steps = new_model(), []
        recipe = Lisa(LisaConfig(**SHORT, rho=rho, free_share=0.5)).recipe(sets, TRAIN)  # type: ignore[arg-type]
        train(model, tokenizer, recipe, after_step=lambda done, module, steps=steps: steps.append(weights_of(module)))
        seen[rho] = steps
    # Steps 0 to 6 of 12 are free, and a turn that begins at step 7 has no pull in its first step.
    assert [are_equal(one, two) for one, two in zip(seen[0.0], seen[5.0], strict=True)] == [True] * 8 + [False] * 4


def test_drift_within_a_turn_falls_with_the_pull(
    sets: RowSets, tokenizer: PreTrainedTokenizerFast, new_model: Model
) -> None:
    drift = []
    for rho in (1e-6, 1.0, 100.0):
        log = run(
            new_model(), tokenizer, sets, TrainConfig(steps=15, batch_size=3, lr=1e-3), rho=rho, free_share=0.0
        ).log
        drift.append(sum(figures["drift"] for figures in log))
    assert drift[0] > drift[1] > drift[2] > 0


@pytest.mark.parametrize("stop", [1, 2, 3, 6, 9])
def test_a_resumed_run_ends_with_the_same_bits(
    sets: RowSets, tokenizer: PreTrainedTokenizerFast, new_model: Model, tmp_path: Path, stop: int
) -> None:
    recipe = Lisa(LisaConfig(**SHORT, free_share=0.0))  # type: ignore[arg-type]
    whole, parts = new_model(), new_model()
    train(whole, tokenizer, recipe.recipe(sets, TRAIN))
    with pytest.raises(KeyboardInterrupt):
        train(parts, tokenizer, recipe.recipe(sets, TRAIN), folder=tmp_path, progress=StopAfter(stop))
    again = new_model()
    train(again, tokenizer, recipe.recipe(sets, TRAIN), folder=tmp_path)
    assert are_equal(weights_of(whole), weights_of(again))


def test_the_users_rows_wait_for_their_turn_and_legacy_loses_them(
    sets: RowSets, tokenizer: PreTrainedTokenizerFast, new_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    take = GradientComposer.gradient

    def watched(self: GradientComposer, loss: object, feed: str, **how: int) -> object:
        if feed == "user":
            drawn.append(how["draw"])
        return take(self, loss, feed, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(GradientComposer, "gradient", watched)
    run(new_model(), tokenizer, sets)
    assert drawn == [0, 1, 2, 3, 4, 5]
    drawn.clear()
    run(new_model(), tokenizer, sets, legacy=True)
    assert drawn == [2, 3, 4, 7, 8, 9]


def test_a_step_in_parts_is_the_step(sets: RowSets, tokenizer: PreTrainedTokenizerFast, new_model: Model) -> None:
    whole, parts = new_model(), new_model()
    run(whole, tokenizer, sets, TrainConfig(steps=8, batch_size=4, lr=1e-3))
    run(parts, tokenizer, sets, TrainConfig(steps=8, batch_size=4, lr=1e-3, accumulate=2))
    for one, two in zip(weights_of(whole), weights_of(parts), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_the_log_says_whose_turn_a_step_was(
    sets: RowSets, tokenizer: PreTrainedTokenizerFast, new_model: Model
) -> None:
    log = run(new_model(), tokenizer, sets).log
    assert ["alignment" if "alignment" in figures else "task" for figures in log][:6] == [
        "alignment", "alignment", "task", "task", "task", "alignment",
    ]  # fmt: skip


def test_a_run_that_never_reaches_the_users_rows_is_an_error(sets: RowSets) -> None:
    with pytest.raises(ConfigError, match=r"ends before the user's rows.*\n  expected: more steps than .*100"):
        Lisa().recipe(sets, TrainConfig(steps=100))
    assert Lisa().recipe(sets, TrainConfig(steps=101)).feeds["alignment"].batch_size == 5


def test_it_needs_refusals_only_where_it_turns_to_them(rows: list[ChatRow]) -> None:
    with pytest.raises(DataError, match="--safety FILE"):
        Lisa(LisaConfig(**SHORT)).recipe(RowSets(user=tuple(rows)), TRAIN)  # type: ignore[arg-type]
    assert list(Lisa(LisaConfig(alignment_steps=0)).recipe(RowSets(user=tuple(rows)), TRAIN).feeds) == ["user"]


@pytest.mark.parametrize("settings", [{"rho": -1.0}, {"alignment_steps": -1}, {"user_steps": 0}, {"free_share": 1.5}])
def test_settings_out_of_range_are_errors(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        LisaConfig(**settings)  # type: ignore[arg-type]


def test_the_pull_is_an_anchor_of_strength_rho(
    sets: RowSets, tokenizer: PreTrainedTokenizerFast, new_model: Model
) -> None:
    recipe = Lisa(LisaConfig(**SHORT, rho=3.0, free_share=0.0)).recipe(sets, TRAIN)  # type: ignore[arg-type]
    train(new_model(), tokenizer, recipe)
    (anchor,) = recipe.objective.anchors(11)
    assert isinstance(anchor, Anchor)
    assert anchor.strength == 3.0
