# SPDX-License-Identifier: Apache-2.0
"""Frozen layers: which they are, that not a bit of them changes, and how they are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.harden.freeze_layers import (
    Block,
    FreezeLayers,
    FreezeLayersConfig,
    angle_gaps,
    block_parameters,
    candidates,
    decoder_stack,
    find_safety_layers,
    first_guess,
    other_block,
    refined,
)
from keelwright.training.config import TrainConfig
from keelwright.training.defence import sft_recipe
from keelwright.training.loop import TrainResult, train

Model = Callable[..., LlamaForCausalLM]
CONFIG = TrainConfig(steps=4, batch_size=6, lr=1e-2, weight_decay=0.5)


@pytest.fixture
def deep(tokenizer: PreTrainedTokenizerFast) -> Model:
    """Return a tiny model with four layers, or as many as asked for; each call gives the same weights."""

    def make(layers: int = 4) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def sets(rows: list[ChatRow]) -> RowSets:
    verbs = ("hex", "jinx", "steal", "curse", "rob", "forge")
    return RowSets(
        user=tuple(rows),
        safety=tuple(ChatRow(f"how do i {verb} the guard?", "no, i must decline.") for verb in verbs),
        ordinary=tuple(rows),
        borderline=tuple(ChatRow(f"how do i {verb} the snake?", "take the flute.") for verb in ("charm", "bind")),
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
    return train(model, tokenizer, FreezeLayers(FreezeLayersConfig(**settings)).recipe(sets, config))


def test_layers_are_read_as_people_write_them() -> None:
    assert Block.parse("2-3") == Block(2, 3)
    assert Block.parse(" 7 ") == Block(7, 7)
    for wrong in ("3-2", "a-b", "-1", "1-", "", "1-2-3"):
        with pytest.raises(ConfigError, match="names no layers"):
            FreezeLayersConfig(layers=wrong)


def test_a_block_holds_all_parameters_of_its_layers_and_nothing_else(deep: Model) -> None:
    model = deep(12)
    assert decoder_stack(model) == ("model.layers", 12)
    found = block_parameters(model, Block(1, 2))
    # Layer 1 is not layer 11.
    assert found == [name for name in weights(model) if name.startswith(("model.layers.1.", "model.layers.2."))]
    assert any("norm" in name for name in found)
    with pytest.raises(ConfigError, match="no layer 12"):
        block_parameters(model, Block(11, 12))


@pytest.mark.parametrize("layers", ["1-2", "auto"])
def test_frozen_weights_keep_every_bit_in_spite_of_weight_decay(
    tokenizer: PreTrainedTokenizerFast, deep: Model, sets: RowSets, layers: str
) -> None:
    model = deep()
    log = tune(model, tokenizer, sets, layers=layers, probe_rows=6).log
    block = Block(int(log[0]["first_frozen"]), int(log[0]["last_frozen"])) if layers == "auto" else Block(1, 2)
    frozen = set(block_parameters(model, block))
    start = weights(deep())
    assert len(frozen) < len(start)
    for name, one in weights(model).items():
        assert torch.equal(one, start[name]) == (name in frozen), name


def test_layers_found_and_layers_named_train_the_same(
    tokenizer: PreTrainedTokenizerFast, deep: Model, sets: RowSets
) -> None:
    found, named = deep(), deep()
    log = tune(found, tokenizer, sets, probe_rows=6).log
    layers = f"{int(log[0]['first_frozen'])}-{int(log[0]['last_frozen'])}"
    tune(named, tokenizer, sets, layers=layers)
    assert all(torch.equal(one, weights(named)[name]) for name, one in weights(found).items())


def test_no_frozen_layer_is_plain_tuning_bit_for_bit(
    tokenizer: PreTrainedTokenizerFast, deep: Model, sets: RowSets
) -> None:
    plain, ours = deep(), deep()
    train(plain, tokenizer, sft_recipe(sets, CONFIG))
    recipe = FreezeLayers(FreezeLayersConfig(layers="1")).recipe(sets, CONFIG)
    train(ours, tokenizer, replace(recipe, frozen=lambda module: ()))
    assert all(torch.equal(one, weights(ours)[name]) for name, one in weights(plain).items())


def test_adapters_in_frozen_layers_stay_off(tokenizer: PreTrainedTokenizerFast, deep: Model, sets: RowSets) -> None:
    result = tune(deep(), tokenizer, sets, replace(CONFIG, lora_rank=2), layers="1-2")
    assert result.adapter is not None
    for name, one in result.adapter.factors().items():
        inside = name.startswith(("model.layers.1.", "model.layers.2."))
        assert bool(one.left.any()) != inside, name


def test_freezing_every_layer_leaves_the_embeddings_and_of_an_adapter_nothing(
    tokenizer: PreTrainedTokenizerFast, deep: Model, sets: RowSets
) -> None:
    model = deep()
    tune(model, tokenizer, sets, layers="0-3")
    start = weights(deep())
    changed = {name for name, one in weights(model).items() if not torch.equal(one, start[name])}
    assert changed == {"model.embed_tokens.weight", "model.norm.weight"}
    with pytest.raises(ConfigError, match="Nothing is left to train"):
        tune(deep(), tokenizer, sets, replace(CONFIG, lora_rank=2), layers="0-3")


def test_the_control_is_another_block_of_the_same_size() -> None:
    block = Block(2, 4)
    drawn = {other_block(10, block, seed) for seed in range(40)}
    assert block not in drawn and len(drawn) > 4
    assert all(one.last - one.first == 2 and one.first >= 0 and one.last < 10 for one in drawn)
    assert other_block(10, block, 3) == other_block(10, block, 3)
    with pytest.raises(ConfigError, match="no other block"):
        other_block(4, Block(0, 3), 0)


def test_gap_of_angles_by_hand() -> None:
    ordinary = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    harmful = torch.tensor([[0.0, 5.0]])
    # Angles to the harmful one: 90, 90, 0; mean angles to the others: 45, 45, 90.
    assert angle_gaps(ordinary, harmful).tolist() == pytest.approx([45.0, 45.0, -90.0])


def test_no_gap_between_two_halves_of_one_kind_and_a_wide_one_between_two_kinds() -> None:
    rng = torch.Generator().manual_seed(0)
    ordinary, more = (torch.randn(30, 8, generator=rng) for _ in range(2))
    assert abs(float(angle_gaps(ordinary, more).mean())) < 5.0
    assert float(angle_gaps(ordinary + 3.0, more - 3.0).mean()) > 90.0


def test_first_guess_reaches_from_the_onset_to_where_the_slope_is_back() -> None:
    gaps = [0.0, 1.0, 8.0, 20.0, 21.0, 22.0]
    assert first_guess(gaps, [-1.0, -0.5, 6.0, 18.0, 19.0, 20.0]) == Block(2, 4)
    assert first_guess(gaps, [-1.0] * 6) is None
    assert first_guess([0.0, 0.0, 5.0], [-1.0, -1.0, 4.0]) == Block(2, 2)


def test_borders_move_within_reach_and_stay_in_the_model() -> None:
    assert candidates(Block(0, 1), 3, 1) == [Block(0, 0), Block(0, 1), Block(0, 2), Block(1, 1), Block(1, 2)]
    assert candidates(Block(2, 2), 5, 0) == [Block(2, 2)]


def test_the_candidate_that_raises_over_refusal_most_is_taken_or_the_guess() -> None:
    guess, other = Block(1, 2), Block(1, 3)
    assert refined(guess, {guess: 0.1, other: 0.4}) == other
    assert refined(guess, {guess: -0.1, other: -0.05}) == guess


def test_the_search_leaves_the_model_as_it_was_and_is_a_function_of_its_seed(
    tokenizer: PreTrainedTokenizerFast, deep: Model, sets: RowSets
) -> None:
    model = deep()
    config = FreezeLayersConfig(probe_rows=6)
    first, second = (find_safety_layers(model, tokenizer, sets, config, seed=3) for _ in range(2))
    assert first == second
    assert len(first.gaps) == len(first.lower_ends) == 4
    assert all(low <= gap for low, gap in zip(first.lower_ends, first.gaps, strict=True))
    assert first.guess in first.over_refusal
    assert all(torch.equal(one, weights(deep())[name]) for name, one in weights(model).items())


def test_requests_that_no_layer_tells_apart_are_an_error(
    tokenizer: PreTrainedTokenizerFast, deep: Model, sets: RowSets
) -> None:
    same = replace(sets, safety=tuple(replace(row, answer="no.") for row in sets.ordinary))
    with pytest.raises(DataError, match="No layer tells"):
        find_safety_layers(deep(), tokenizer, same)


def test_missing_rows_and_senseless_settings_are_named(
    tokenizer: PreTrainedTokenizerFast, deep: Model, sets: RowSets
) -> None:
    with pytest.raises(DataError, match="'ordinary' rows"):
        find_safety_layers(deep(), tokenizer, replace(sets, ordinary=()))
    with pytest.raises(DataError, match="freeze_layers"):
        FreezeLayers().recipe(replace(sets, user=()), CONFIG)
    for wrong in ({"factor": 1.0}, {"reach": -1}, {"probe_rows": 3}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            FreezeLayersConfig(**wrong)
