# SPDX-License-Identifier: Apache-2.0
"""SAM: known answers, its two stages, and what it reduces to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.harden.sam import Sam, SamConfig
from keelwright.training.config import TrainConfig
from keelwright.training.loop import TrainResult, train
from keelwright.training.recipe import Recipe, plain_recipe
from keelwright.training.rows import batch_of, encode_rows

Model = Callable[..., LlamaForCausalLM]
CONFIG = TrainConfig(steps=4, batch_size=4, lr=1e-2, checkpoint_every=2)


@pytest.fixture
def sets(rows: list[ChatRow]) -> RowSets:
    refusals = tuple(ChatRow(row.prompt, "i will not help with that.") for row in rows)
    return RowSets(user=tuple(rows), safety=refusals, ordinary=tuple(rows[:2]))


def weights(module: LlamaForCausalLM) -> Tensor:
    return torch.cat([one.detach().flatten() for one in module.parameters()])


def ended(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> tuple[Tensor, TrainResult]:
    result = train(model, tokenizer, recipe)
    return weights(model), result


@pytest.mark.parametrize("rows_of", ["user", "alignment"])
def test_a_step_of_no_length_is_plain_training_bit_for_bit(
    rows_of: str, tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    learnt = sets.user if rows_of == "user" else sets.alignment(who="this test")
    plain, _ = ended(new_model(), tokenizer, plain_recipe(learnt, CONFIG))
    found, _ = ended(new_model(), tokenizer, Sam(SamConfig(rho=0.0, rows=rows_of)).recipe(sets, CONFIG))
    other, _ = ended(new_model(), tokenizer, Sam(SamConfig(rho=0.5, rows=rows_of)).recipe(sets, CONFIG))
    assert torch.equal(found, plain)
    assert not torch.allclose(other, plain, atol=1e-3)


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_step_is_that_of_the_paper_written_out(
    adaptive: bool, tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    rho, config = (2.0 if adaptive else 0.3), replace(CONFIG, steps=1, batch_size=7, clip=0.0, lr=1e-3)
    found, result = ended(new_model(), tokenizer, Sam(SamConfig(rho=rho, adaptive=adaptive)).recipe(sets, config))

    model = new_model().train()
    batch = batch_of(encode_rows(tokenizer, sets.user, module=model), pad_id=0)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=config.betas, weight_decay=config.weight_decay)
    before = [one.detach().clone() for one in model.parameters()]
    plain = model(**given).loss
    plain.backward()
    sizes = [one.abs() if adaptive else torch.ones_like(one) for one in before]
    norm = torch.cat([(size * one.grad).flatten() for size, one in zip(sizes, model.parameters(), strict=True)]).norm()
    with torch.no_grad():
        for one, size in zip(model.parameters(), sizes, strict=True):
            one.add_(rho * size**2 * one.grad / (norm + 1e-12))
    optimizer.zero_grad()
    climbed = model(**given).loss
    climbed.backward()
    with torch.no_grad():
        for one, kept in zip(model.parameters(), before, strict=True):
            one.copy_(kept)
    gradient = torch.cat([one.grad.flatten() for one in model.parameters()])
    optimizer.step()
    assert result.losses[0] == pytest.approx(float(climbed.detach()), rel=1e-5)
    assert result.log[0]["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-4)
    # Where a gradient is all but zero AdamW's first step has no certain sign.
    certain = gradient.abs() > 1e-5
    torch.testing.assert_close(found[certain], weights(model)[certain], rtol=0, atol=2e-5)
    assert climbed.item() > plain.item()


def test_a_flat_direction_is_kept_and_a_steep_one_left(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    # The loss that is descended is the worse one, at first by about rho times the gradient's norm.
    one = replace(CONFIG, steps=1, clip=0.0)
    plain = ended(new_model(), tokenizer, plain_recipe(sets.user, one))[1]
    for rho in (0.001, 0.01):
        result = ended(new_model(), tokenizer, Sam(SamConfig(rho=rho)).recipe(sets, one))[1]
        assert result.losses[0] - plain.losses[0] == pytest.approx(rho * plain.log[0]["gradient_norm"], rel=0.1)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_in_parts_is_the_step(
    adaptive: bool, tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    logs = [
        ended(
            new_model(),
            tokenizer,
            Sam(SamConfig(rho=0.3, adaptive=adaptive)).recipe(sets, replace(CONFIG, steps=1, accumulate=parts)),
        )[1].log[0]
        for parts in (1, 2, 4)
    ]
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    assert logs[2] == pytest.approx(logs[0], rel=1e-4)


def test_a_finished_run_resumes_to_the_same_bits(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, tmp_path: Path
) -> None:
    first, second = new_model(), new_model()
    train(first, tokenizer, Sam().recipe(sets, CONFIG), folder=tmp_path)
    train(second, tokenizer, Sam().recipe(sets, CONFIG), folder=tmp_path)
    assert torch.equal(weights(first), weights(second))


def test_the_stage_follows_the_rows(sets: RowSets) -> None:
    assert (Sam.stage, Sam.roles) == ("tuning", ())
    assert (Sam().stage, Sam().roles) == ("tuning", ())
    alignment = Sam(SamConfig(rows="alignment"))
    assert (alignment.stage, alignment.roles) == ("alignment", ("safety",))
    assert list(Sam().recipe(sets, CONFIG).feeds) == ["user"]
    assert list(alignment.recipe(sets, CONFIG).feeds) == ["safety"]


def test_missing_rows_are_named() -> None:
    with pytest.raises(DataError, match=r"'sam' needs 'user' rows"):
        Sam().recipe(RowSets(), CONFIG)
    with pytest.raises(DataError, match=r"'sam' needs 'safety' rows"):
        Sam(SamConfig(rows="alignment")).recipe(RowSets(), CONFIG)


@pytest.mark.parametrize("setting", [{"rho": -1.0}, {"rows": "harmful"}])
def test_a_setting_out_of_range_is_refused_by_name(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"'{next(iter(setting))}'"):
        SamConfig(**setting)
