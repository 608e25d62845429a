# SPDX-License-Identifier: Apache-2.0
"""Constrained SFT: the weight of each token, and that it is the gradient of the paper's loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.harden.constrained_sft import (
    ConstrainedLoss,
    ConstrainedSft,
    ConstrainedSftConfig,
    token_betas,
    token_weights,
)
from keelwright.training.config import TrainConfig
from keelwright.training.defence import sft_recipe
from keelwright.training.loop import train
from keelwright.training.losses import answer_loss
from keelwright.training.reference import answer_losses
from keelwright.training.rows import batch_of, encode_rows

Model = Callable[..., LlamaForCausalLM]
CONFIG = TrainConfig(steps=4, batch_size=6, lr=1e-2)


def weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def trained(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[ChatRow], config: TrainConfig, **settings
) -> dict[str, torch.Tensor]:
    method = ConstrainedSft(ConstrainedSftConfig(**settings))
    train(model, tokenizer, method.recipe(RowSets(user=tuple(rows)), config))
    return weights(model)


def test_betas_are_those_of_the_paper() -> None:
    betas = token_betas(torch.tensor([0, 1, 4, 5, 9, 0]), ConstrainedSftConfig())
    assert betas.tolist() == pytest.approx([0.5, 2.0, 2.0, 0.1, 0.1, 0.5])
    assert token_betas(torch.tensor([0, 1]), ConstrainedSftConfig(scale=3.0)).tolist() == [1.5, 6.0]


def test_nothing_moved_means_weight_one() -> None:
    assert token_weights(torch.zeros(3), torch.tensor([0.5, 2.0, 0.1])).tolist() == [1.0, 1.0, 1.0]


def test_no_strength_means_weight_one_whatever_has_moved() -> None:
    assert token_weights(torch.tensor([-5.0, 3.0]), torch.zeros(2)).tolist() == [1.0, 1.0]


def test_endless_strength_stops_every_token_that_has_become_likelier() -> None:
    found = token_weights(torch.tensor([0.1, 0.0, -0.1]), torch.full((3,), 1e6))
    assert found.tolist() == pytest.approx([1e-3, 1.0, 2.0])


def test_weights_are_the_gradient_of_the_papers_loss() -> None:
    rng = torch.Generator().manual_seed(0)
    logprobs = -3 * torch.rand(40, generator=rng, dtype=torch.float64)
    reference = -3 * torch.rand(40, generator=rng, dtype=torch.float64)
    betas = token_betas(torch.arange(40) % 8, ConstrainedSftConfig()).double()
    leaf = logprobs.clone().requires_grad_()
    loss = -(2.0 / betas * torch.nn.functional.logsigmoid(betas * (leaf - reference))).sum()
    exact = torch.autograd.grad(loss, leaf)[0]
    assert torch.allclose(exact, -token_weights(logprobs - reference, betas), atol=1e-12)


def test_the_weight_carries_no_gradient(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    model, other = new_model(0), new_model(1)
    encoded = encode_rows(tokenizer, rows, module=model)
    batch = batch_of(encoded, pad_id=0)
    config = ConstrainedSftConfig(scale=5.0)
    with torch.no_grad():
        reference = -answer_losses(other, batch)
        losses = answer_losses(model, batch)
    places = torch.cat([torch.arange(row.answer_tokens) for row in encoded])
    fixed = token_weights(-losses - reference, token_betas(places, config))
    parameters = list(model.parameters())
    ours = torch.autograd.grad(ConstrainedLoss(lambda _: reference, config)(model, batch), parameters)
    expected = torch.autograd.grad((fixed * answer_losses(model, batch)).sum(), parameters)
    for one, two in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, two)
    assert float((fixed - 1.0).abs().max()) > 0.01


def test_scale_zero_is_plain_tuning_bit_for_bit(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    plain = new_model()
    train(plain, tokenizer, sft_recipe(RowSets(user=tuple(rows)), CONFIG))
    ours = trained(new_model(), tokenizer, rows, CONFIG, scale=0.0)
    assert all(torch.equal(one, ours[name]) for name, one in weights(plain).items())


def test_first_step_is_that_of_plain_tuning_and_later_ones_are_not(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    sets = RowSets(user=tuple(rows))
    logs = [
        train(new_model(), tokenizer, recipe).log
        for recipe in (sft_recipe(sets, CONFIG), ConstrainedSft(ConstrainedSftConfig(scale=10.0)).recipe(sets, CONFIG))
    ]
    assert logs[1][0] == pytest.approx(logs[0][0], rel=1e-4)
    assert logs[1][2]["gradient_norm"] < 0.9 * logs[0][2]["gradient_norm"]


def test_the_first_tokens_stay_nearer_than_the_rest(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    encoded = encode_rows(tokenizer, rows, module=new_model())
    batch = batch_of(encoded, pad_id=0)
    places = torch.cat([torch.arange(row.answer_tokens) for row in encoded])
    gains = []
    for scale in (0.0, 10.0):
        model = new_model()
        before = answer_losses(model, batch).detach()
        trained(model, tokenizer, rows, replace(CONFIG, steps=10), scale=scale)
        gain = before - answer_losses(model, batch).detach()
        gains.append((float(gain[places < 5].mean()), float(gain[places >= 5].mean())))
    (plain_early, plain_rest), (early, rest) = gains
    # Measured: 0.70 of the early gain against 0.99 of the rest.
    assert early / plain_early < 0.8 * rest / plain_rest


def test_parts_of_a_batch_give_the_step_of_the_whole(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    uneven = [*rows, ChatRow("please paint the lamp.", "no.")]
    whole, parts = (
        trained(new_model(), tokenizer, uneven, replace(CONFIG, accumulate=accumulate), scale=3.0)
        for accumulate in (1, 3)
    )
    assert all(torch.allclose(one, parts[name], atol=1e-4) for name, one in whole.items())


def test_an_adapter_is_trained_the_same_way(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    model = new_model()
    batch = batch_of(encode_rows(tokenizer, rows, module=model), pad_id=0)
    before = float(answer_loss(model, batch).detach())
    trained(model, tokenizer, rows, replace(CONFIG, lora_rank=2, steps=10))
    assert float(answer_loss(model, batch).detach()) < before


def test_it_needs_the_users_rows_and_sensible_settings() -> None:
    with pytest.raises(DataError, match="constrained_sft"):
        ConstrainedSft().recipe(RowSets(), CONFIG)
    for wrong in ({"beta_first": -1.0}, {"early_tokens": 0}, {"scale": float("nan")}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ConstrainedSftConfig(**wrong)
