# SPDX-License-Identifier: Apache-2.0
"""KL to the reference: strength 0, the start, the four choices of rows, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.harden.kl_reference import KlReference, KlReferenceConfig
from keelwright.training.config import TrainConfig
from keelwright.training.defence import sft_recipe
from keelwright.training.loop import TrainResult, train
from keelwright.training.reference import answer_logits
from keelwright.training.rows import batch_of, encode_rows

Model = Callable[..., LlamaForCausalLM]
CONFIG = TrainConfig(steps=5, batch_size=6, lr=1e-2)


@pytest.fixture
def sets(rows: list[ChatRow]) -> RowSets:
    return RowSets(
        user=tuple(rows),
        safety=tuple(
            ChatRow(f"how do i {verb} the guard?", "no, i must decline.") for verb in ("hex", "jinx", "steal")
        ),
        ordinary=(ChatRow("please bake the bread.", "take the pan."),),
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
    return train(model, tokenizer, KlReference(KlReferenceConfig(**settings)).recipe(sets, config))


@pytest.mark.parametrize("rows_of", ["safety", "alignment", "user", "both"])
def test_beta_zero_is_plain_tuning_bit_for_bit(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, rows_of: str
) -> None:
    plain, ours = new_model(), new_model()
    train(plain, tokenizer, sft_recipe(sets, CONFIG))
    tune(ours, tokenizer, sets, beta=0.0, rows=rows_of)
    assert all(torch.equal(one, weights(ours)[name]) for name, one in weights(plain).items())


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_value_is_zero_at_the_start_and_grows(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, direction: str, lora_rank: int
) -> None:
    config = replace(CONFIG, lora_rank=lora_rank, steps=8)
    log = tune(new_model(), tokenizer, sets, config, beta=1e-6, direction=direction).log
    assert log[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert log[-1]["kl"] > 1e-3


def test_first_step_is_that_of_plain_tuning(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    plain, ours = new_model(), new_model()
    one = replace(CONFIG, steps=1)
    first = train(plain, tokenizer, sft_recipe(sets, one)).log[0]
    assert tune(ours, tokenizer, sets, one, beta=5.0, cache_mb=0).log[0]["gradient_norm"] == pytest.approx(
        first["gradient_norm"], rel=1e-5
    )


def distance(
    model: LlamaForCausalLM, start: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: tuple
) -> float:
    batch = batch_of(encode_rows(tokenizer, rows, module=start), pad_id=0)
    with torch.no_grad():
        ours, theirs = (answer_logits(one, batch)[0].log_softmax(-1) for one in (model, start))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.mark.parametrize("rows_of", ["safety", "alignment", "user", "both"])
def test_rows_that_are_held_stay_nearer_to_the_start(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, rows_of: str
) -> None:
    plain, ours = new_model(), new_model()
    config = replace(CONFIG, steps=12)
    train(plain, tokenizer, sft_recipe(sets, config))
    tune(ours, tokenizer, sets, config, beta=5.0, rows=rows_of)
    held = {"safety": ["safety"], "alignment": ["safety", "ordinary"], "user": ["user"], "both": ["user", "safety"]}
    for role in held[rows_of]:
        some = getattr(sets, role)
        assert distance(ours, new_model(), tokenizer, some) < 0.6 * distance(plain, new_model(), tokenizer, some)


@pytest.mark.parametrize("rows_of", ["safety", "both"])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_kept_reference_and_an_asked_one_give_the_same_run(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, rows_of: str, lora_rank: int
) -> None:
    config = replace(CONFIG, lora_rank=lora_rank, lr=1e-3)
    kept, asked = (
        tune(new_model(), tokenizer, sets, config, beta=1.0, rows=rows_of, cache_mb=megabytes).log
        for megabytes in (256, 0)
    )
    for one, two in zip(kept, asked, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


def test_penalty_on_the_users_rows_is_part_of_the_loss(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    log = tune(new_model(), tokenizer, sets, beta=1.0, rows="user").log
    assert set(log[0]) == {"loss", "gradient_norm"}
    plain = train(new_model(), tokenizer, sft_recipe(sets, CONFIG)).log
    assert log[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert log[-1]["loss"] > plain[-1]["loss"]


def test_parts_of_a_batch_give_the_step_of_the_whole(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    logs = [
        tune(
            new_model(), tokenizer, sets, replace(CONFIG, accumulate=parts, lr=1e-3), beta=1.0, rows="both", cache_mb=0
        ).log
        for parts in (1, 3)
    ]
    for one, two in zip(*logs, strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-6)


def test_rows_that_are_held_are_drawn_as_many_as_asked_for(sets: RowSets) -> None:
    def feeds(**settings: object) -> dict[str, int | None]:
        recipe = KlReference(KlReferenceConfig(**settings)).recipe(sets, CONFIG)
        return {name: feed.batch_size for name, feed in recipe.feeds.items()}

    assert feeds() == {"user": None, "safety": None}
    assert feeds(safety_batch=2) == {"user": None, "safety": 2}
    assert feeds(rows="user") == {"user": None}


def test_missing_rows_and_senseless_settings_are_named(sets: RowSets) -> None:
    with pytest.raises(DataError, match="kl_reference"):
        KlReference().recipe(replace(sets, safety=()), CONFIG)
    for wrong in ({"beta": -1.0}, {"direction": "sideways"}, {"rows": "all"}, {"cache_mb": -1}, {"safety_batch": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            KlReferenceConfig(**wrong)
