# SPDX-License-Identifier: Apache-2.0
"""LDIFS: the distance of features, what it does not feel, and the port's quirks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError, NumericalError
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.harden.ldifs import (
    Ldifs,
    LdifsConfig,
    LdifsLoss,
    chosen_layers,
    gated_distance,
    squared_distance,
)
from keelwright.training.config import TrainConfig
from keelwright.training.defence import sft_recipe
from keelwright.training.loop import TrainResult, train
from keelwright.training.losses import answer_loss
from keelwright.training.rows import batch_of, encode_rows
from keelwright.training.setup import Reference

Model = Callable[..., LlamaForCausalLM]
CONFIG = TrainConfig(steps=5, batch_size=4, lr=1e-2)


@pytest.fixture
def sets(rows: list[ChatRow]) -> RowSets:
    return RowSets(user=(*rows, ChatRow("please paint the lamp.", "no.")))


def weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def tune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sets: RowSets,
    config: TrainConfig = CONFIG,
    **settings: object,
) -> TrainResult:
    return train(model, tokenizer, Ldifs(LdifsConfig(**settings)).recipe(sets, config))


def test_every_so_many_blocks_and_the_last_are_compared() -> None:
    assert chosen_layers(4, 4) == (4,)
    assert chosen_layers(6, 4) == (4, 6)
    assert chosen_layers(3, 1) == (1, 2, 3)
    assert chosen_layers(2, 5) == (2,)


def test_distance_is_a_mean_over_width_and_a_sum_over_tokens_and_layers() -> None:
    ours = [torch.tensor([[[1.0, 3.0], [0.0, 0.0], [9.0, 9.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])]
    theirs = [torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)]
    wanted = torch.tensor([[True, True, False]])
    assert float(squared_distance(ours, theirs, wanted)) == pytest.approx((1 + 9) / 2 + 1 / 2 + 4 / 2)


def test_the_port_halves_sums_everything_and_leaves_out_what_has_moved_far() -> None:
    near, far = torch.full((1, 2, 2), 0.1), torch.full((1, 2, 2), 100.0)
    zero = torch.zeros(1, 2, 2)
    assert float(gated_distance([near], [zero], 1.0)) == pytest.approx(0.5 * 4 * 0.01)
    assert float(gated_distance([near, far], [zero, zero], 1.0)) == pytest.approx(0.5 * 4 * 0.01)
    assert float(gated_distance([far], [zero], 1.0)) == 0.0


@pytest.mark.parametrize("legacy", [False, True])
def test_lambda_zero_is_plain_tuning_bit_for_bit(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, legacy: bool
) -> None:
    plain, ours = new_model(), new_model()
    train(plain, tokenizer, sft_recipe(sets, CONFIG))
    tune(ours, tokenizer, sets, lambda_=0.0, legacy=legacy)
    assert all(torch.equal(one, weights(ours)[name]) for name, one in weights(plain).items())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_value_and_gradient_are_zero_at_the_start(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, legacy: bool, lora_rank: int
) -> None:
    config = replace(CONFIG, lora_rank=lora_rank)
    plain = train(new_model(), tokenizer, sft_recipe(sets, config)).log
    ours = tune(new_model(), tokenizer, sets, config, lambda_=10.0 if legacy else 100.0, legacy=legacy).log
    assert ours[0] == pytest.approx(plain[0], rel=1e-5)
    assert ours[2] != pytest.approx(plain[2], rel=1e-3)


def loss_of(ours: LlamaForCausalLM, theirs: LlamaForCausalLM, **settings: object) -> LdifsLoss:
    return LdifsLoss(LdifsConfig(**settings), Reference(theirs), ours, (1, 2))


def test_padding_is_not_felt_except_by_the_port(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    ours, theirs = new_model(0), new_model(1)
    encoded = encode_rows(tokenizer, sets.user[-2:], module=ours)

    def apart_and_together(loss: LdifsLoss) -> tuple[float, float]:
        with torch.no_grad():
            alone = sum(float(loss(ours, batch_of([row], pad_id=0))) for row in encoded)
            return alone, float(loss(ours, batch_of(encoded, pad_id=0)))

    alone, together = apart_and_together(loss_of(ours, theirs))
    assert together == pytest.approx(alone, rel=1e-4)
    alone, together = apart_and_together(loss_of(ours, theirs, legacy=True, lambda_=50.0))
    with torch.no_grad():
        plain = float(answer_loss(ours, batch_of(encoded, pad_id=0)))
    assert together - plain > 1.1 * (alone - plain) > 0


def test_the_reference_is_frozen(tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets) -> None:
    ours, theirs = new_model(0), new_model(1)
    batch = batch_of(encode_rows(tokenizer, sets.user, module=ours), pad_id=0)
    loss = loss_of(ours, theirs)(ours, batch)
    assert all(one is None for one in torch.autograd.grad(loss, list(theirs.parameters()), allow_unused=True))


def test_mean_over_tokens_is_the_same_in_parts(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    logs = [
        tune(new_model(), tokenizer, sets, replace(CONFIG, accumulate=parts, lr=1e-3), lambda_=50.0).log
        for parts in (1, 2)
    ]
    for one, two in zip(*logs, strict=True):
        assert one == pytest.approx(two, rel=2e-3, abs=1e-5)


def test_reported_penalty_is_the_mean_over_all_tokens_of_the_step(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    model, start = new_model(), new_model()
    config = replace(CONFIG, steps=2, batch_size=8)
    found = tune(model, tokenizer, sets, config, lambda_=3.0).losses[1]
    moved = new_model()
    tune(moved, tokenizer, sets, replace(config, steps=1), lambda_=3.0)
    batch = batch_of(encode_rows(tokenizer, sets.user, module=start), pad_id=0)
    wanted = batch.attention_mask.bool()
    with torch.no_grad():
        ours, theirs = (
            one(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True).hidden_states
            for one in (moved, start)
        )
        plain = answer_loss(moved, batch) / (batch.labels[:, 1:] != -100).sum()
    penalty = (ours[-1][wanted] - theirs[-1][wanted]).square().mean()
    assert found == pytest.approx(float(plain + 3.0 * penalty), rel=1e-4)


def test_features_stay_nearer_than_under_plain_tuning(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    batch = batch_of(encode_rows(tokenizer, sets.user, module=new_model()), pad_id=0)
    moved = []
    for lambda_ in (0.0, 30.0):
        model = new_model()
        tune(model, tokenizer, sets, replace(CONFIG, steps=15, lr=1e-3), lambda_=lambda_)
        with torch.no_grad():
            ours, theirs = (
                one(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
                ).hidden_states[-1]
                for one in (model, new_model())
            )
        moved.append(float((ours - theirs)[batch.attention_mask.bool()].square().mean()))
    assert moved[1] < 0.6 * moved[0]


def test_features_that_are_not_finite_stop_the_run(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    with pytest.raises(NumericalError, match="not finite"):
        tune(new_model(), tokenizer, sets, lambda_=float("inf"))


def test_a_model_without_mlp_modules_has_no_legacy_form(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    model = new_model()
    for layer in model.model.layers:
        layer.feed_forward = layer.mlp
        del layer._modules["mlp"]
    loss = loss_of(model, model, legacy=True)
    with pytest.raises(ConfigError, match="leave 'legacy' off"):
        loss(model, batch_of(encode_rows(tokenizer, sets.user, module=model), pad_id=0))


def test_missing_rows_and_senseless_settings_are_named() -> None:
    with pytest.raises(DataError, match="ldifs"):
        Ldifs().recipe(RowSets(), CONFIG)
    for wrong in ({"lambda_": -1.0}, {"every": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            LdifsConfig(**wrong)
