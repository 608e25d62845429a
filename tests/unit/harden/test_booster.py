# SPDX-License-Identifier: Apache-2.0
"""Booster: what its settings reduce to, what it takes, what it logs."""

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
from keelwright.harden.booster import Booster, BoosterConfig
from keelwright.training.config import TrainConfig
from keelwright.training.loop import TrainResult, train
from keelwright.training.recipe import Recipe, plain_recipe

Model = Callable[..., LlamaForCausalLM]
CONFIG = TrainConfig(steps=4, batch_size=4, lr=1e-2, checkpoint_every=2)


@pytest.fixture
def sets(rows: list[ChatRow]) -> RowSets:
    refusals = tuple(ChatRow(row.prompt, "i will not help with that.") for row in rows)
    return RowSets(harmful=tuple(rows), safety=refusals, ordinary=tuple(rows[:2]))


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


@pytest.mark.parametrize("setting", [{"lambda_": 0.0}, {"alpha": 0.0}])
def test_without_weight_or_step_it_is_plain_alignment_bit_for_bit(
    setting: dict[str, float], tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    plain, _ = ended(new_model(), tokenizer, plain_recipe(sets.alignment(who="this test"), CONFIG))
    found, result = ended(new_model(), tokenizer, Booster(BoosterConfig(**setting)).recipe(sets, CONFIG))
    assert torch.equal(found, plain)
    assert set(result.log[0]) == {"alignment", "gradient_norm"}


def test_a_step_of_almost_no_length_changes_almost_nothing(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    one = replace(CONFIG, steps=1, clip=0.0)
    norms = [
        ended(new_model(), tokenizer, Booster(BoosterConfig(alpha=alpha)).recipe(sets, one))[1].log[0]
        for alpha in (1e-4, 1e-3, 1e-2)
    ]
    changes = [norm["harm_gradient_change"] for norm in norms]
    # The difference of the two gradients is of first order in alpha.
    assert changes[1] / changes[0] == pytest.approx(10.0, rel=0.1)
    assert changes[2] / changes[1] == pytest.approx(10.0, rel=0.1)


def test_the_log_shows_the_drop_and_both_norms(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    alpha = 1e-3
    _, result = ended(new_model(), tokenizer, Booster(BoosterConfig(alpha=alpha)).recipe(sets, CONFIG))
    expected = {"alignment", "harm", "harm after a step", "gradient_norm", "harm_gradient", "harm_gradient_change"}
    assert all(set(step) == expected for step in result.log)
    assert result.losses == tuple(step["alignment"] for step in result.log)
    for step in result.log:
        drop = step["harm"] - step["harm after a step"]
        assert drop / alpha == pytest.approx(step["harm_gradient"], rel=0.05)


def test_it_differs_from_plain_alignment_and_from_learning_harm(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    ends = [
        ended(new_model(), tokenizer, Booster(BoosterConfig(lambda_=one)).recipe(sets, CONFIG))[0] for one in (0, 5)
    ]
    assert not torch.allclose(ends[0], ends[1], atol=1e-4)


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_step_in_parts_is_the_step_with_adapters_or_without(
    lora_rank: int, gradient_checkpointing: bool, tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    logs = []
    for parts in (1, 2):
        config = replace(
            CONFIG, steps=1, accumulate=parts, lora_rank=lora_rank, gradient_checkpointing=gradient_checkpointing
        )
        logs.append(train(new_model(), tokenizer, Booster(BoosterConfig(alpha=0.02)).recipe(sets, config)).log[0])
    assert logs[0] == pytest.approx(logs[1], rel=1e-3, abs=1e-6)


def test_an_adapter_is_hardened_and_the_model_below_keeps_its_bits(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    model, before = new_model(), weights(new_model())
    result = train(model, tokenizer, Booster().recipe(sets, replace(CONFIG, lora_rank=2)))
    assert result.adapter is not None
    assert any(float(one.left.abs().max()) > 0 for one in result.adapter.factors().values())
    assert torch.equal(weights(result.adapter.detach()), before)


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    stopped_after: int, tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, tmp_path: Path
) -> None:
    whole, expected = ended(new_model(attention_dropout=0.1), tokenizer, Booster().recipe(sets, CONFIG))
    with pytest.raises(KeyboardInterrupt):
        train(
            new_model(attention_dropout=0.1),
            tokenizer,
            Booster().recipe(sets, CONFIG),
            folder=tmp_path,
            progress=StopAfter(stopped_after),
        )
    resumed = new_model(attention_dropout=0.1)
    result = train(resumed, tokenizer, Booster().recipe(sets, CONFIG), folder=tmp_path)
    assert torch.equal(weights(resumed), whole)
    assert result.log == expected.log


def test_the_order_of_the_rows_follows_the_seed(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    logs = [
        ended(new_model(), tokenizer, Booster().recipe(sets, replace(CONFIG, seed=seed)))[1].log for seed in (1, 1, 2)
    ]
    assert logs[0] == logs[1] != logs[2]


def test_harmful_rows_have_a_batch_of_their_own(sets: RowSets) -> None:
    recipe = Booster(BoosterConfig(harmful_batch=3)).recipe(sets, CONFIG)
    assert recipe.feeds["harmful"].batch_size == 3
    assert list(recipe.feeds) == ["safety", "harmful"]
    assert len(recipe.feeds["safety"].rows) == len(sets.safety) + len(sets.ordinary)
    assert recipe.settings == {"method": "booster", "lambda_": 5.0, "alpha": 0.1, "harmful_batch": 3}


def test_missing_rows_are_named(sets: RowSets) -> None:
    with pytest.raises(DataError, match=r"'booster' needs 'harmful' rows"):
        Booster().recipe(replace(sets, harmful=()), CONFIG)
    with pytest.raises(DataError, match=r"'booster' needs 'safety' rows"):
        Booster().recipe(replace(sets, safety=()), CONFIG)


@pytest.mark.parametrize("setting", [{"lambda_": -1.0}, {"alpha": -0.1}, {"harmful_batch": 0}])
def test_a_setting_out_of_range_is_refused_by_name(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"'{next(iter(setting))}'"):
        BoosterConfig(**setting)
