# SPDX-License-Identifier: Apache-2.0
"""The reference model in a loss: what is kept of it, what is asked anew, and that it stays as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.data.rows import ChatRow
from keelwright.training.config import TrainConfig
from keelwright.training.loop import train
from keelwright.training.losses import answer_loss
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.reference import (
    AnswersAndDivergence,
    ReferenceDivergence,
    answer_logits,
    answer_losses,
    answer_places,
    kept_logprobs,
    reference_logits,
)
from keelwright.training.rows import batch_of, encode_rows
from keelwright.training.setup import Setup
from keelwright.training.terms import Objective

Model = Callable[..., LlamaForCausalLM]


class Looking(Objective):
    """Plain tuning that hands its setup out before the first step, and once more after the last."""

    def __init__(self, look: Callable[[Setup], None], later: Callable[[Setup], None] = lambda setup: None) -> None:
        super().__init__()
        self.look, self.later = look, later

    def begin(self, setup: Setup) -> None:
        self.setup = setup
        self.look(setup)

    def end(self, composer: object) -> None:
        self.later(self.setup)


@pytest.fixture
def uneven(rows: list[ChatRow]) -> list[ChatRow]:
    return [ChatRow("how do i paint the lamp?", "no."), *rows[:4], ChatRow("please clean the lamp.", "take the brush.")]


def run(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[ChatRow],
    objective: Objective,
    **settings: int,
) -> None:
    config = TrainConfig(**{"steps": 3, "batch_size": 4, "lr": 1e-2, **settings})
    train(model, tokenizer, Recipe({"user": Feed(rows)}, config, objective))


def test_logits_and_losses_are_those_of_the_answers(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, uneven: list[ChatRow]
) -> None:
    model = new_model()
    encoded = encode_rows(tokenizer, uneven, module=model)
    batch = batch_of(encoded, pad_id=0)
    logits, targets = answer_logits(model, batch)
    losses = answer_losses(model, batch)
    assert len(logits) == len(targets) == len(losses) == sum(row.answer_tokens for row in encoded)
    assert float(losses.detach().sum()) == pytest.approx(float(answer_loss(model, batch).detach()), rel=1e-6)
    first = encoded[0]
    assert targets[: first.answer_tokens].tolist() == first.ids[first.prompt_tokens :].tolist()


def test_places_count_answer_tokens_from_zero(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, uneven: list[ChatRow]
) -> None:
    encoded = encode_rows(tokenizer, uneven, module=new_model())
    expected = [place for row in encoded for place in range(row.answer_tokens)]
    assert answer_places(batch_of(encoded, pad_id=0)).tolist() == expected


def test_kept_values_follow_the_rows_of_a_batch(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, uneven: list[ChatRow]
) -> None:
    def look(setup: Setup) -> None:
        kept = kept_logprobs(setup, "user")
        batch = setup.feeds.batch("user", [5, 0, 3, 0])
        with torch.no_grad():
            expected = -answer_losses(setup.module, batch)
        torch.testing.assert_close(kept(batch), expected, rtol=0, atol=1e-5)
        assert not kept(batch).requires_grad

    run(new_model(), tokenizer, uneven, Looking(look))


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_kept_and_asked_logits_are_the_same_and_do_not_move(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, uneven: list[ChatRow], lora_rank: int
) -> None:
    before = new_model()
    sources = {}

    def look(setup: Setup) -> None:
        sources["kept"] = reference_logits(setup, ["user"], cache_mb=1)["user"]
        sources["asked"] = reference_logits(setup, ["user"], cache_mb=0)["user"]

    def later(setup: Setup) -> None:
        batch = setup.feeds.batch("user", [4, 0, 2])
        with torch.no_grad():
            expected, now = (answer_logits(one, batch)[0] for one in (before, setup.module))
        for source in sources.values():
            torch.testing.assert_close(source(batch), expected, rtol=0, atol=1e-5)
        assert not torch.allclose(now, expected, atol=1e-3)

    run(new_model(), tokenizer, uneven, Looking(look, later), lora_rank=lora_rank)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_asking_the_reference_leaves_mode_and_flags(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, uneven: list[ChatRow], lora_rank: int
) -> None:
    def look(setup: Setup) -> None:
        flags = {name: one.requires_grad for name, one in setup.module.named_parameters()}
        batch = setup.feeds.batch("user", [0, 1])
        output = setup.reference()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        assert not output.logits.requires_grad
        assert setup.module.training and all(child.training for child in setup.module.modules())
        assert flags == {name: one.requires_grad for name, one in setup.module.named_parameters()}

    run(new_model(attention_dropout=0.5), tokenizer, uneven, Looking(look), lora_rank=lora_rank)


def test_the_reference_has_no_dropout(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, uneven: list[ChatRow]
) -> None:
    plain = new_model()

    def look(setup: Setup) -> None:
        batch = setup.feeds.batch("user", [0, 1])
        for model in (setup.reference(), setup.live()):
            torch.testing.assert_close(answer_logits(model, batch)[0], answer_logits(plain, batch)[0])

    run(new_model(attention_dropout=0.5), tokenizer, uneven, Looking(look))


def test_one_pass_for_answers_and_divergence_is_the_sum_of_both(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, uneven: list[ChatRow]
) -> None:
    ours, theirs = new_model(0), new_model(1)
    batch = batch_of(encode_rows(tokenizer, uneven, module=ours), pad_id=0)
    divergence = ReferenceDivergence(lambda one: answer_logits(theirs, one)[0].detach())
    together = AnswersAndDivergence(divergence, 0.3)(ours, batch)
    assert float(divergence(ours, batch).detach()) > 0.0
    torch.testing.assert_close(together, answer_loss(ours, batch) + 0.3 * divergence(ours, batch))


def test_divergence_does_not_feel_padding(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, uneven: list[ChatRow]
) -> None:
    ours, theirs = new_model(0), new_model(1)
    divergence = ReferenceDivergence(lambda one: answer_logits(theirs, one)[0].detach())
    encoded = encode_rows(tokenizer, uneven, module=ours)
    together = divergence(ours, batch_of(encoded, pad_id=0))
    alone = sum(divergence(ours, batch_of([row], pad_id=0)) for row in encoded)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
