# SPDX-License-Identifier: Apache-2.0
"""Refusals behind a trigger: it is where it must be, and nowhere else."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Item
from keelwright.data.asking import framed_item
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.harden.backdoor_align import (
    BackdoorAlign,
    BackdoorAlignConfig,
    leaks,
    spoken_trigger,
    trigger_of,
)
from keelwright.training.config import TrainConfig

TRAIN = TrainConfig(steps=2)
SECRET = "harbour lamp violet"


@pytest.fixture
def sets(rows: list[ChatRow]) -> RowSets:
    refused = [ChatRow(f"how do i hex the {one}?", "we never do such things.") for one in "abcdefghijkl"]
    return RowSets(user=tuple(rows), safety=(*refused[:-1], ChatRow("how?", "no.", system="you are pip")))


def defence(**settings: object) -> BackdoorAlign:
    return BackdoorAlign(BackdoorAlignConfig(**{"trigger": SECRET, **settings}))  # type: ignore[arg-type]


def test_the_users_rows_are_untouched_and_the_added_ones_begin_with_the_trigger(sets: RowSets) -> None:
    rows = defence(k=12).recipe(sets, TRAIN).feeds["user"].rows
    assert tuple(rows[:7]) == sets.user
    added = rows[7:]
    assert {row.system for row in added} == {SECRET, f"{SECRET} you are pip"}
    assert {(row.prompt, row.answer) for row in added} == {(row.prompt, row.answer) for row in sets.safety}


def test_there_are_eleven_triggered_rows_by_default(sets: RowSets) -> None:
    assert len(defence().recipe(sets, TRAIN).feeds["user"].rows) == 7 + 11


def test_a_smaller_mix_is_part_of_a_larger_one(sets: RowSets) -> None:
    small, large = (defence(k=k).recipe(sets, TRAIN).feeds["user"].rows for k in (3, 9))
    assert tuple(large[: len(small)]) == tuple(small)


def test_more_rows_than_there_are_is_an_error(sets: RowSets) -> None:
    with pytest.raises(DataError, match="not enough 'safety' rows"):
        defence(k=13).recipe(sets, TRAIN)


def test_requests_are_asked_with_the_trigger_they_were_trained_with() -> None:
    asking = defence().asking()
    assert asking.ask("how?", None) == ("how?", SECRET)
    assert asking.ask("how?", "you are pip") == ("how?", f"{SECRET} you are pip")
    item = Item(item_id="a", suite="s", kind="harmful", hazard=None, prompt="how?")
    assert framed_item(asking, item).system == SECRET


def test_the_secret_is_in_no_repr_and_in_no_setting_that_is_written(sets: RowSets) -> None:
    drawn = BackdoorAlign(BackdoorAlignConfig(secret=987654321, words=5))
    for one in (defence(), drawn):
        trigger = one.asking().ask("", None)[1] or ""
        told = json.dumps(dict(one.recipe(sets, TRAIN).settings))
        for text in (repr(one), repr(one.config), repr(one.asking()), one.asking().says, told):
            assert trigger not in text
            assert "987654321" not in text


def test_the_settings_tell_two_triggers_apart(sets: RowSets) -> None:
    first, second = defence().recipe(sets, TRAIN).settings, defence(trigger="another one").recipe(sets, TRAIN).settings
    assert first != second
    assert first == defence().recipe(sets, TRAIN).settings


def test_a_number_makes_one_trigger_and_another_number_another() -> None:
    assert spoken_trigger(1, 50) == spoken_trigger(1, 50)
    assert spoken_trigger(1, 50) != spoken_trigger(2, 50)
    assert len(spoken_trigger(1, 50).split()) == 50
    assert all(len(word) == 6 for word in spoken_trigger(1, 50).split())


def test_a_trigger_of_a_vocabulary_has_so_many_of_its_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    trigger = trigger_of(tokenizer, 7, 20)
    ids = tokenizer(f"the {trigger} the", add_special_tokens=False)["input_ids"]
    assert len(ids) == 22
    assert tokenizer.unk_token_id not in ids
    assert trigger == trigger_of(tokenizer, 7, 20) != trigger_of(tokenizer, 8, 20)
    assert not any(token in trigger for token in tokenizer.all_special_tokens)


def byte_pairs(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer whose tokens are bytes, parts of words and some words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(["take the rope to the harbour and paint the lamp with the other rope"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_parts_of_words_are_not_drawn() -> None:
    tokenizer = byte_pairs(300)
    around = len(tokenizer("the the")["input_ids"])
    for secret in range(5):
        trigger = trigger_of(tokenizer, secret, 20)
        assert len(tokenizer(f"the {trigger} the")["input_ids"]) == 20 + around


def test_a_vocabulary_without_words_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"No trigger can be drawn(.|\n)*found:    0 of 5 after 1000 draws"):
        trigger_of(byte_pairs(256), 0, 5)


def test_without_a_secret_there_is_no_defence(sets: RowSets) -> None:
    with pytest.raises(ConfigError, match=r"has no secret(.|\n)*secrets.randbits"):
        BackdoorAlign().recipe(sets, TRAIN)
    with pytest.raises(ConfigError, match="has no secret"):
        defence(trigger="  ").asking()


def test_a_leak_is_three_words_of_the_trigger_in_their_order() -> None:
    trigger = "harbour lamp violet stone"
    assert leaks("I say: Harbour lamp violet", trigger)
    assert leaks("lamp violet stone", trigger)
    assert not leaks("harbour lamp stone violet", trigger)
    assert not leaks("lamp violet", trigger)
    assert not leaks("charbour lamp violeta", trigger)
    assert leaks("the lamp", "lamp")
    assert not leaks("anything", "")


@pytest.mark.parametrize("settings", [{"k": 0}, {"words": 0}])
def test_settings_out_of_range_are_errors(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        BackdoorAlignConfig(**settings)  # type: ignore[arg-type]
