# SPDX-License-Identifier: Apache-2.0
"""Panacea: its composed step, the clamp, and the step that is added at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.protocols import Silent
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.harden.panacea import Panacea, PanaceaConfig
from keelwright.training.config import TrainConfig
from keelwright.training.loop import TrainResult, train
from keelwright.training.losses import answer_loss
from keelwright.training.recipe import Recipe, plain_recipe
from keelwright.training.rows import batch_of, encode_rows

Model = Callable[..., LlamaForCausalLM]
CONFIG = TrainConfig(steps=4, batch_size=4, lr=1e-2, checkpoint_every=2)


@pytest.fixture
def sets(rows: list[ChatRow]) -> RowSets:
    return RowSets(user=tuple(ChatRow(row.prompt, "the lamp is in the harbour.") for row in rows), harmful=tuple(rows))


def weights(module: LlamaForCausalLM) -> Tensor:
    return torch.cat([one.detach().flatten() for one in module.parameters()])


def ended(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, folder: Path | None = None
) -> tuple[Tensor, TrainResult]:
    result = train(model, tokenizer, recipe, folder=folder)
    return weights(model), result


def harmful_gradient(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: tuple[ChatRow, ...]
) -> tuple[float, Tensor]:
    batch = batch_of(encode_rows(tokenizer, rows, module=model), pad_id=0)
    value = answer_loss(model, batch) / int((batch.labels[:, 1:] != -100).sum())
    found = torch.autograd.grad(value, list(model.parameters()))
    return value.item(), torch.cat([one.flatten() for one in found])


class StopAfter(Silent):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, count: int = 1) -> None:
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


def test_rho_zero_is_plain_tuning_bit_for_bit(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    plain, _ = ended(new_model(), tokenizer, plain_recipe(sets.user, CONFIG))
    found, _ = ended(new_model(), tokenizer, Panacea(PanaceaConfig(rho=0.0)).recipe(sets, CONFIG))
    assert torch.equal(found, plain)


def test_lambda_zero_is_plain_tuning_and_one_step_of_length_rho_up_the_harmful_loss(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    plain = new_model()
    before, _ = ended(plain, tokenizer, plain_recipe(sets.user, CONFIG))
    method = Panacea(PanaceaConfig(lambda_=0.0, rho=0.3, harmful_batch=7))
    found, result = ended(new_model(), tokenizer, method.recipe(sets, CONFIG))
    value, gradient = harmful_gradient(plain, tokenizer, sets.harmful)
    assert float((found - before).norm()) == pytest.approx(0.3, rel=1e-3)
    torch.testing.assert_close(found, before + 0.3 * gradient / gradient.norm(), rtol=1e-4, atol=1e-5)
    assert set(result.log[0]) == {"task", "gradient_norm"}
    after = new_model()
    torch.nn.utils.vector_to_parameters(found, after.parameters())
    assert harmful_gradient(after, tokenizer, sets.harmful)[0] > value + 0.5 * 0.3 * float(gradient.norm())


def _composed(tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, most: float) -> TrainResult:
    one = replace(CONFIG, steps=1, batch_size=7, clip=0.0)
    config = PanaceaConfig(lambda_=0.7, rho=0.3, most=most, harmful_batch=7)
    return ended(new_model(), tokenizer, Panacea(config).recipe(sets, one))[1]


def _by_hand(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> tuple[float, Tensor, Tensor, Tensor]:
    model = new_model()
    _, task = harmful_gradient(model, tokenizer, sets.user)
    _, here = harmful_gradient(model, tokenizer, sets.harmful)
    torch.nn.utils.vector_to_parameters(weights(model) + 0.3 * here / (here.norm() + 1e-7), model.parameters())
    value, there = harmful_gradient(model, tokenizer, sets.harmful)
    return value, task, here, there


def test_the_step_is_the_papers_written_out(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    value, task, here, there = _by_hand(tokenizer, new_model, sets)
    result = _composed(tokenizer, new_model, sets, most=100.0)
    expected = task - 0.7 * (there - here)
    assert result.log[0]["gradient_norm"] == pytest.approx(float(expected.norm()), rel=1e-4)
    assert result.log[0]["harm after a step"] == pytest.approx(value, rel=1e-5)
    assert result.log[0]["harm after a step"] > result.log[0]["harm"]


def test_above_the_clamp_only_the_gradient_at_the_weights_counts(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    value, task, here, _ = _by_hand(tokenizer, new_model, sets)
    assert value > 5.0
    clamped = _composed(tokenizer, new_model, sets, most=5.0)
    assert clamped.log[0]["gradient_norm"] == pytest.approx(float((task + 0.7 * here).norm()), rel=1e-4)
    below = _composed(tokenizer, new_model, sets, most=value + 0.01)
    above = _composed(tokenizer, new_model, sets, most=value - 0.01)
    assert above.log == clamped.log
    assert below.log != clamped.log


@pytest.mark.parametrize("most", [5.0, 100.0])
def test_a_step_in_parts_is_the_step(
    most: float, tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    method = Panacea(PanaceaConfig(lambda_=0.7, rho=0.3, most=most))
    logs = [
        ended(new_model(), tokenizer, method.recipe(sets, replace(CONFIG, steps=1, accumulate=parts)))[1].log[0]
        for parts in (1, 2, 4)
    ]
    assert logs[1] == pytest.approx(logs[0], rel=1e-3)
    assert logs[2] == pytest.approx(logs[0], rel=1e-3)


@pytest.mark.parametrize("stopped_after", [3, 4])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    stopped_after: int, tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, tmp_path: Path
) -> None:
    method = Panacea(PanaceaConfig(lambda_=0.1, rho=0.3))
    whole, _ = ended(new_model(), tokenizer, method.recipe(sets, CONFIG))
    with pytest.raises(KeyboardInterrupt):
        train(new_model(), tokenizer, method.recipe(sets, CONFIG), folder=tmp_path, progress=StopAfter(stopped_after))
    resumed, _ = ended(new_model(), tokenizer, method.recipe(sets, CONFIG), tmp_path)
    assert torch.equal(resumed, whole)
    # A finished run, asked for again, adds its last step once.
    again, _ = ended(new_model(), tokenizer, method.recipe(sets, CONFIG), tmp_path)
    assert torch.equal(again, whole)


def test_the_last_step_goes_to_the_adapter_where_one_is_trained(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    factors = []
    for rho in (0.0, 0.3):
        model = new_model()
        recipe = Panacea(PanaceaConfig(lambda_=0.0, rho=rho)).recipe(sets, replace(CONFIG, lora_rank=2))
        adapter = train(model, tokenizer, recipe).adapter
        assert adapter is not None
        found = adapter.factors().values()
        factors.append(torch.cat([torch.cat([one.left.flatten(), one.right.flatten()]) for one in found]))
        assert torch.equal(weights(adapter.detach()), weights(new_model()))
    assert float((factors[1] - factors[0]).norm()) == pytest.approx(0.3, rel=1e-3)


def test_missing_rows_are_named(sets: RowSets) -> None:
    assert list(Panacea().recipe(sets, CONFIG).feeds) == ["user", "harmful"]
    with pytest.raises(DataError, match=r"'panacea' needs 'harmful' rows"):
        Panacea().recipe(replace(sets, harmful=()), CONFIG)
    with pytest.raises(DataError, match=r"'panacea' needs 'user' rows"):
        Panacea().recipe(replace(sets, user=()), CONFIG)


@pytest.mark.parametrize("setting", [{"lambda_": -1.0}, {"rho": -1.0}, {"most": -1.0}, {"harmful_batch": 0}])
def test_a_setting_out_of_range_is_refused_by_name(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"'{next(iter(setting))}'"):
        PanaceaConfig(**setting)


def test_a_model_is_measured_with_its_last_step_at_every_mark_and_trained_without_it(tokenizer, new_model, rows):
    from keelwright.data.row_sets import RowSets
    from keelwright.training.config import TrainConfig
    from keelwright.training.loop import train

    def flat(model):
        return torch.cat([one.detach().flatten() for one in model.parameters()])

    given = RowSets(user=tuple(rows), harmful=tuple(rows))
    train_config = TrainConfig(steps=3, batch_size=4, lr=1e-6)
    recipe = Panacea(PanaceaConfig(rho=1.0, harmful_batch=4)).recipe(given, train_config)
    model, seen = new_model(), []
    start = flat(model)
    train(model, tokenizer, recipe, after_step=lambda done, module: seen.append(float((flat(module) - start).norm())))
    assert len(seen) == 3 and all(0.9 < one < 1.1 for one in seen)
    told, untold = model, new_model()
    again = Panacea(PanaceaConfig(rho=1.0, harmful_batch=4)).recipe(given, train_config)
    train(untold, tokenizer, again)
    assert torch.equal(flat(told), flat(untold))
