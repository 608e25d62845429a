# SPDX-License-Identifier: Apache-2.0
"""Vaccine: what its settings reduce to, and that parts add up."""

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
from keelwright.harden.vaccine import Vaccine, VaccineConfig
from keelwright.training.config import TrainConfig
from keelwright.training.loop import TrainResult, train
from keelwright.training.recipe import Recipe, plain_recipe

Model = Callable[..., LlamaForCausalLM]
CONFIG = TrainConfig(steps=4, batch_size=4, lr=1e-2, checkpoint_every=2)
NOISE = VaccineConfig(rho=0.1, direction="noise")


@pytest.fixture
def sets(rows: list[ChatRow]) -> RowSets:
    refusals = tuple(ChatRow(row.prompt, "i will not help with that.") for row in rows)
    return RowSets(safety=refusals, ordinary=tuple(rows[:2]))


def weights(module: LlamaForCausalLM) -> Tensor:
    return torch.cat([one.detach().flatten() for one in module.parameters()])


def ended(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> tuple[Tensor, TrainResult]:
    result = train(model, tokenizer, recipe)
    return weights(model), result


class StopAfter(Silent):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, count: int = 1) -> None:
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("direction", ["gradient", "noise"])
def test_rho_zero_is_plain_alignment_bit_for_bit(
    direction: str, tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    plain, _ = ended(new_model(), tokenizer, plain_recipe(sets.alignment(who="this test"), CONFIG))
    none = VaccineConfig(rho=0.0, direction=direction)
    found, _ = ended(new_model(), tokenizer, Vaccine(none).recipe(sets, CONFIG))
    other, _ = ended(new_model(), tokenizer, Vaccine(replace(none, rho=2.0)).recipe(sets, CONFIG))
    assert torch.equal(found, plain)
    assert not torch.allclose(other, plain, atol=1e-3)


def test_the_loss_that_is_descended_is_the_worse_one(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    one = replace(CONFIG, steps=1)
    losses = [
        ended(new_model(), tokenizer, Vaccine(VaccineConfig(rho=rho)).recipe(sets, one))[1].losses[0]
        for rho in (0.0, 0.1, 1.0)
    ]
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("config", [VaccineConfig(), NOISE], ids=["gradient", "noise"])
@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_step_in_parts_is_the_step_with_adapters_or_without(
    config: VaccineConfig,
    lora_rank: int,
    gradient_checkpointing: bool,
    tokenizer: PreTrainedTokenizerFast,
    new_model: Model,
    sets: RowSets,
) -> None:
    logs = []
    for parts, again in ((1, False), (2, gradient_checkpointing), (4, gradient_checkpointing)):
        one = replace(CONFIG, steps=1, accumulate=parts, lora_rank=lora_rank, gradient_checkpointing=again)
        logs.append(train(new_model(), tokenizer, Vaccine(config).recipe(sets, one)).log[0])
    assert logs[1] == pytest.approx(logs[0], rel=1e-3)
    assert logs[2] == pytest.approx(logs[0], rel=1e-3)


@pytest.mark.parametrize("config", [VaccineConfig(), NOISE], ids=["gradient", "noise"])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    config: VaccineConfig, tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, tmp_path: Path
) -> None:
    whole, expected = ended(new_model(attention_dropout=0.1), tokenizer, Vaccine(config).recipe(sets, CONFIG))
    resumed = new_model(attention_dropout=0.1)
    with pytest.raises(KeyboardInterrupt):
        train(
            new_model(attention_dropout=0.1),
            tokenizer,
            Vaccine(config).recipe(sets, CONFIG),
            folder=tmp_path,
            progress=StopAfter(3),
        )
    result = train(resumed, tokenizer, Vaccine(config).recipe(sets, CONFIG), folder=tmp_path)
    assert torch.equal(weights(resumed), whole)
    assert result.log == expected.log


def test_noise_follows_the_seed_of_the_run(tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets) -> None:
    one = replace(CONFIG, steps=1, batch_size=9)
    losses = [
        ended(new_model(), tokenizer, Vaccine(NOISE).recipe(sets, replace(one, seed=seed)))[1].losses[0]
        for seed in (1, 1, 2)
    ]
    # All rows are in the batch, so that the seeds differ in the noise alone.
    assert losses[0] == losses[1]
    assert abs(losses[0] - losses[2]) > 1e-4


def test_refusals_are_needed_and_harmful_answers_are_not(sets: RowSets) -> None:
    assert list(Vaccine().recipe(sets, CONFIG).feeds) == ["safety"]
    with pytest.raises(DataError, match=r"'vaccine' needs 'safety' rows"):
        Vaccine().recipe(RowSets(), CONFIG)


@pytest.mark.parametrize("setting", [{"rho": -1.0}, {"direction": "up"}])
def test_a_setting_out_of_range_is_refused_by_name(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"'{next(iter(setting))}'"):
        VaccineConfig(**setting)
