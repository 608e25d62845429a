# SPDX-License-Identifier: Apache-2.0
"""Chat rows as batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import DataError
from keelwright.data.rows import ChatRow, Cut
from keelwright.models import chat
from keelwright.training.rows import IGNORED, batch_indices, batch_of, encode_rows

Model = Callable[..., LlamaForCausalLM]


def test_loss_falls_on_the_answer_and_its_end_token_alone(tokenizer: PreTrainedTokenizerFast, new_model: Model) -> None:
    row = ChatRow("say 2 plus 3", "5", system="you are pip")
    (encoded,) = encode_rows(tokenizer, [row], module=new_model())
    batch = batch_of([encoded], pad_id=0)
    carried = batch.input_ids[batch.labels != IGNORED]
    assert tokenizer.convert_ids_to_tokens(carried.tolist()) == ["5", "</s>"]


def test_the_prompt_is_what_generation_will_see(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    (encoded,) = encode_rows(tokenizer, rows[:1], module=new_model())
    seen = chat.encode(tokenizer, chat.render(tokenizer, rows[0].prompt))
    assert encoded.ids[: encoded.prompt_tokens].tolist() == seen
    assert seen.count(tokenizer.bos_token_id) == 1


def test_padding_is_masked_and_has_no_loss(tokenizer: PreTrainedTokenizerFast, new_model: Model) -> None:
    rows = [ChatRow("say 2 plus 3", "5"), ChatRow("how do i paint the lamp in the tower?", "use the rope.")]
    encoded = encode_rows(tokenizer, rows, module=new_model())
    batch = batch_of(encoded, pad_id=tokenizer.pad_token_id)
    assert batch.attention_mask.sum(1).tolist() == [len(row.ids) for row in encoded]
    assert (batch.input_ids[0, len(encoded[0].ids) :] == tokenizer.pad_token_id).all()
    assert (batch.labels[batch.attention_mask == 0] == IGNORED).all()


def test_no_rows_is_an_error(tokenizer: PreTrainedTokenizerFast, new_model: Model) -> None:
    with pytest.raises(DataError, match="no rows to train on"):
        encode_rows(tokenizer, [], module=new_model())


def test_a_row_longer_than_the_model_is_named(tokenizer: PreTrainedTokenizerFast, new_model: Model) -> None:
    rows = [ChatRow("say 2 plus 3", "5"), ChatRow("lamp " * 70, "5")]
    with pytest.raises(DataError, match=r"Row 2 is too long for the model.\n  expected: at most 64 tokens"):
        encode_rows(tokenizer, rows, module=new_model())


def test_every_epoch_passes_each_row_once_in_its_own_order() -> None:
    picked = [index for step in range(9) for index in batch_indices(12, 4, step, seed=3)]
    epochs = [picked[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    first = batch_indices(100, 5, 7, seed=1)
    torch.manual_seed(2)
    assert batch_indices(100, 5, 7, seed=1) == first
    assert batch_indices(100, 5, 7, seed=2) != first


def test_a_batch_larger_than_an_epoch_runs_into_the_next() -> None:
    picked = batch_indices(3, 8, 0, seed=0)
    assert len(picked) == 8
    assert sorted(picked[:3]) == sorted(picked[3:6]) == [0, 1, 2]


def test_a_given_beginning_is_read_and_not_learned(tokenizer: PreTrainedTokenizerFast, new_model: Model) -> None:
    whole = ChatRow("how do i paint the lamp?", "use the rope in the harbour.")
    begun = ChatRow(whole.prompt, " in the harbour.", prefill="use the rope")
    first, second = encode_rows(tokenizer, [whole, begun], module=new_model())
    assert torch.equal(first.ids, second.ids)
    assert second.prompt_tokens == first.prompt_tokens + 3
    batch = batch_of([second], pad_id=0)
    carried = batch.input_ids[batch.labels != IGNORED]
    assert tokenizer.convert_ids_to_tokens(carried.tolist()) == ["in", "the", "harbour", ".", "</s>"]


def test_a_beginning_is_broken_off_between_its_tokens(tokenizer: PreTrainedTokenizerFast, new_model: Model) -> None:
    row = ChatRow("how do i paint the lamp?", " use the rope.", prefill="no, we must decline.", prefill_cut=Cut(0.5))
    (encoded,) = encode_rows(tokenizer, [row], module=new_model())
    prompt = len(chat.encode(tokenizer, chat.render(tokenizer, row.prompt)))
    tokens = tokenizer.convert_ids_to_tokens(encoded.ids[prompt:].tolist())
    assert tokens == ["no", ",", "we", "use", "the", "rope", ".", "</s>"]
    assert encoded.prompt_tokens == prompt + 3


def test_rows_can_be_encoded_without_a_model(tokenizer, new_model, rows):
    alone = encode_rows(tokenizer, rows)
    beside = encode_rows(tokenizer, rows, module=new_model())
    assert [one.ids.tolist() for one in alone] == [one.ids.tolist() for one in beside]
