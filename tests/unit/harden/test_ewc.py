# SPDX-License-Identifier: Apache-2.0
"""EWC: the Fisher of whole answers, the springs, and what they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.harden.ewc import Ewc, EwcConfig, EwcObjective, fisher_diagonal, penalty, sampled_answer
from keelwright.training.config import TrainConfig
from keelwright.training.defence import sft_recipe
from keelwright.training.loop import TrainResult, train
from keelwright.training.losses import answer_loss
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.rows import batch_of, encode_rows
from keelwright.training.setup import Setup
from keelwright.training.terms import Anchor, Objective, pulled

Model = Callable[..., LlamaForCausalLM]
CONFIG = TrainConfig(steps=6, batch_size=6, lr=1e-2)


@pytest.fixture
def sets(rows: list[ChatRow]) -> RowSets:
    refusals = ("no, i must decline.", "we never teach anyone to do such things.", "no.")
    return RowSets(
        user=tuple(rows),
        safety=tuple(ChatRow(row.prompt, refusals[index % 3]) for index, row in enumerate(rows)),
    )


def weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def tune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sets: RowSets,
    config: TrainConfig = CONFIG,
    **settings: object,
) -> TrainResult:
    return train(model, tokenizer, Ewc(EwcConfig(**settings)).recipe(sets, config))


def measured(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sets: RowSets,
    config: TrainConfig = CONFIG,
    **settings: object,
) -> list[torch.Tensor]:
    """Return the Fisher as a run measures it at its start."""
    found: list[torch.Tensor] = []

    class Looking(Objective):
        def begin(self, setup: Setup) -> None:
            found.extend(fisher_diagonal(setup, "safety", EwcConfig(**settings)))

    feeds = {"user": Feed(sets.user), "safety": Feed(sets.safety)}
    train(model, tokenizer, Recipe(feeds, replace(config, steps=1), Looking()))
    return found


def test_known_answer() -> None:
    weight, target = torch.tensor([1.1, 1.8]), torch.tensor([1.0, 2.0])
    fisher = torch.tensor([2.0, 0.5])
    assert float(penalty([weight], [target], [fisher], 10.0)) == pytest.approx(0.2, rel=1e-5)
    gradient = pulled([None], [weight], Anchor([target], 10.0, [fisher]))
    assert gradient[0].tolist() == pytest.approx([2.0, -1.0], rel=1e-5)


def test_the_springs_pull_as_autograd_says() -> None:
    rng = torch.Generator().manual_seed(0)
    weight, target, fisher = (torch.rand(4, 3, generator=rng) for _ in range(3))
    leaf = weight.clone().requires_grad_()
    expected = torch.autograd.grad(0.5 * 3.0 * (fisher * (leaf - target).square()).sum(), leaf)[0]
    found = pulled([torch.zeros(4, 3)], [weight], Anchor([target], 3.0, [fisher]))[0]
    torch.testing.assert_close(found, expected)


def test_equal_stiffness_is_a_pull_to_the_start() -> None:
    weight, target = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    plain = pulled([None], [weight], Anchor([target], 2.0))[0]
    assert torch.equal(pulled([None], [weight], Anchor([target], 2.0, [torch.ones(2)]))[0], plain)


@pytest.mark.parametrize("precision_rows", [0, 4])
def test_fisher_is_the_mean_square_of_each_rows_gradient(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, precision_rows: int
) -> None:
    model = new_model()
    rows = sets.safety[: precision_rows or None]
    parameters = list(model.parameters())
    squares = [torch.zeros_like(one) for one in parameters]
    for row in encode_rows(tokenizer, rows, module=model):
        loss = answer_loss(model, batch_of([row], pad_id=0))
        gradient = torch.autograd.grad(loss, parameters)
        squares = [total + one.square() / len(rows) for total, one in zip(squares, gradient, strict=True)]
    mean = sum(float(one.sum()) for one in squares) / sum(one.numel() for one in squares)
    found = measured(model, tokenizer, sets, fisher_rows=precision_rows)
    for one, two in zip(found, squares, strict=True):
        torch.testing.assert_close(one, two / mean, rtol=1e-4, atol=1e-5)
    assert sum(float(one.double().sum()) for one in found) / sum(one.numel() for one in found) == pytest.approx(1.0)


def test_fisher_is_not_the_square_of_a_batch_and_does_not_depend_on_its_size(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    first, second = (
        measured(new_model(), tokenizer, sets, replace(CONFIG, batch_size=size, accumulate=parts))
        for size, parts in ((2, 1), (6, 3))
    )
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    model = new_model()
    loss = answer_loss(model, batch_of(encode_rows(tokenizer, sets.safety, module=model), pad_id=0))
    batch = [one.square() for one in torch.autograd.grad(loss, list(model.parameters()))]
    ours, theirs = (torch.cat([one.flatten() for one in some]) for some in (first, batch))
    assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) < 0.99


def test_sampled_answers_come_from_the_model_and_end_where_it_ends(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    model = new_model()
    row = encode_rows(tokenizer, sets.safety, module=model)[1]
    device = torch.device("cpu")
    drawn = [sampled_answer(model, row, device, seed=0, place=place) for place in range(40)]
    assert torch.equal(drawn[0].ids, sampled_answer(model, row, device, seed=0, place=0).ids)
    assert len({tuple(one.ids.tolist()) for one in drawn}) > 30
    for one in drawn:
        assert torch.equal(one.ids[: row.prompt_tokens], row.ids[: row.prompt_tokens])
        assert 1 <= one.answer_tokens <= row.answer_tokens
    end = int(row.ids[-1])

    def only(token: int) -> Callable[..., object]:
        logits = torch.full((1, 1, len(tokenizer)), -1e9)
        logits[..., token] = 0.0
        return lambda **_: type("Output", (), {"logits": logits})()

    assert sampled_answer(only(end), row, device, seed=0, place=0).answer_tokens == 1
    assert sampled_answer(only(end + 1), row, device, seed=0, place=0).answer_tokens == row.answer_tokens
    first, second = (measured(new_model(), tokenizer, sets, labels=labels) for labels in ("empirical", "sampled"))
    assert not all(torch.allclose(one, two) for one, two in zip(first, second, strict=True))


def test_lambda_zero_is_plain_tuning_bit_for_bit(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    plain, ours = new_model(), new_model()
    train(plain, tokenizer, sft_recipe(sets, CONFIG))
    tune(ours, tokenizer, replace(sets, safety=()), lambda_=0.0)
    assert all(torch.equal(one, weights(ours)[name]) for name, one in weights(plain).items())


def test_the_stiffer_the_springs_the_nearer_the_start(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    start = weights(new_model())
    fisher = measured(new_model(), tokenizer, sets)
    moved = []
    for lambda_ in (0.0, 1.0, 100.0):
        model = new_model()
        tune(model, tokenizer, sets, replace(CONFIG, steps=30, lr=1e-3), lambda_=lambda_)
        moved.append(float(penalty([*weights(model).values()], [*start.values()], fisher, 1.0)))
    assert moved[0] > 1.3 * moved[1] > 3 * moved[2]


def test_endless_stiffness_keeps_the_start() -> None:
    # The minimum of u(w) = (w - 3)^2 / 2 under springs from 1: (3 + lambda F) / (1 + lambda F).
    for lambda_, expected in ((0.0, 3.0), (1.0, 2.0), (1e6, 1.0)):
        weight, target, fisher = torch.tensor([1.0]), torch.tensor([1.0]), torch.ones(1)
        for _ in range(200):
            gradient = pulled([weight - 3.0], [weight], Anchor([target], lambda_, [fisher]))[0]
            weight = weight - gradient / (1.0 + lambda_)
        assert float(weight) == pytest.approx(expected, abs=1e-4)


def test_the_log_holds_the_penalty(tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets) -> None:
    log = tune(new_model(), tokenizer, sets, lambda_=5.0).log
    assert log[0]["penalty"] == 0.0
    assert log[1]["penalty"] > 0.0


def test_a_new_adapter_is_refused_and_says_why(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    config = replace(CONFIG, lora_rank=2)
    with pytest.raises(ConfigError, match="second factor is 0"):
        tune(new_model(), tokenizer, sets, config)
    # What the error says is so: nothing pulls on the first factors.
    names: list[str] = []
    found: list[torch.Tensor] = []

    class Looking(Objective):
        def begin(self, setup: Setup) -> None:
            names.extend(setup.composer.names)
            found.extend(fisher_diagonal(setup, "safety", EwcConfig()))

    feeds = {"user": Feed(sets.user), "safety": Feed(sets.safety)}
    train(new_model(), tokenizer, Recipe(feeds, replace(config, steps=1), Looking()))
    for name, one in zip(names, found, strict=True):
        assert bool(one.any()) == ("lora_B" in name)


def test_nothing_is_measured_at_lambda_zero() -> None:
    objective = EwcObjective(config=EwcConfig(lambda_=0.0))
    objective.begin(None)  # type: ignore[arg-type]
    assert objective.anchors(0) == ()


def test_missing_rows_and_senseless_settings_are_named(sets: RowSets) -> None:
    with pytest.raises(DataError, match="ewc"):
        Ewc().recipe(replace(sets, safety=()), CONFIG)
    for wrong in ({"lambda_": -1.0}, {"labels": "guessed"}, {"fisher_rows": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            EwcConfig(**wrong)
