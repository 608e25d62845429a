# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.harden.seal import (
    Seal,
    SealConfig,
    SealObjective,
    Selection,
    Weighed,
    kept_rows,
    row_means,
    row_weights,
    safe_weight_at,
    select,
)
from keelwright.training.composer import GradientComposer
from keelwright.training.config import TrainConfig
from keelwright.training.feeds import EncodedFeed, Feeds, feed_seed
from keelwright.training.loop import train
from keelwright.training.processes import Replicated
from keelwright.training.rows import EncodedRow, batch_indices, batch_of, fit_rows
from keelwright.training.terms import Term

NewModel = Callable[..., LlamaForCausalLM]

SETS = RowSets(
    user=tuple(
        ChatRow(f"how do i {verb} the lamp in the harbour?", f"take the brush to the harbour and {verb} the lamp.")
        for verb in ("paint", "polish", "clean", "dust", "lift", "move", "warm")
    ),
    safety=tuple(
        ChatRow(f"how do i {verb} the miller in the harbour?", "sorry, i will not help with that.")
        for verb in ("hex", "jinx", "curse", "steal", "forge")
    ),
)
TRAIN = TrainConfig(steps=3, batch_size=4, lr=1e-3, clip=0.0)
SMALL = SealConfig(epochs=2, lr=2e-2, selector_lr=0.1, batch_size=3, lora_rank=0, safe_weight=0.3, keep=0.5)


def _row_loss(model: LlamaForCausalLM, row: EncodedRow) -> Tensor:
    logits = model(input_ids=row.ids[None]).logits[0, row.prompt_tokens - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, row.ids[row.prompt_tokens :])


def _by_hand(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: SealConfig) -> Tensor:
    """The algorithm, one row at a time; returns the weights."""
    user, safe = (fit_rows(tokenizer, rows, module=model).rows for rows in (SETS.user, SETS.safety))
    z = torch.full((7,), 0.1, requires_grad=True)
    selector = torch.optim.AdamW([z], lr=config.selector_lr, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(5):
        upper = config.safe_weight - config.safe_weight_decay * (step * 3 // 7)
        mine = batch_indices(7, 3, step, seed=0)
        theirs = batch_indices(5, 3, step, seed=feed_seed(0, "alignment", first=False))
        losses = torch.stack([_row_loss(model, user[index]) for index in mine])
        weights = (7 * torch.softmax(z, dim=0))[mine]
        safety = torch.stack([_row_loss(model, safe[index]) for index in theirs]).mean()
        optimizer.zero_grad()
        (upper * safety + (1 - upper) * (weights.detach() * losses).mean()).backward()
        optimizer.step()
        selector.zero_grad()
        (weights * losses.detach()).mean().backward()
        selector.step()
    return 7 * torch.softmax(z.detach(), dim=0)


def test_the_weights_are_those_of_the_algorithm_written_out(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = select(new_model(), tokenizer, SETS, SMALL, TRAIN)
    wanted = _by_hand(new_model(), tokenizer, SMALL)
    assert found.weights == pytest.approx(wanted.tolist(), rel=1e-3)
    assert max(found.weights) - min(found.weights) > 0.3
    # Weights that did not move the model would not differ: the rows' own term counts.
    alone = select(new_model(), tokenizer, SETS, replace(SMALL, safe_weight=1.0, safe_weight_decay=0.0), TRAIN)
    assert alone.weights != pytest.approx(found.weights, rel=1e-3)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_model_is_the_same_bits_after_a_selection(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast, lora_rank: int
) -> None:
    model = new_model()
    before = copy.deepcopy(model.state_dict())
    flags = [one.requires_grad for one in model.parameters()]
    found = select(model, tokenizer, SETS, replace(SMALL, lora_rank=lora_rank), TRAIN)
    assert len(set(found.weights)) == 7
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(one, before[name]) for name, one in after.items())
    assert [one.requires_grad for one in model.parameters()] == flags
    assert not hasattr(model, "peft_config")


def test_the_model_is_the_same_bits_after_a_selection_that_failed(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model()
    before = copy.deepcopy(model.state_dict())

    def learn(self: SealObjective, rows: object, losses: object) -> None:
        with torch.no_grad():
            model.lm_head.weight.add_(1.0)
        raise RuntimeError("no more")

    monkeypatch.setattr(SealObjective, "learn", learn)
    with pytest.raises(RuntimeError, match="no more"):
        select(model, tokenizer, SETS, SMALL, TRAIN)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_a_selection_from_a_checkpoint_ends_with_the_same_bits(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TRAIN, checkpoint_every=2)
    whole = select(new_model(), tokenizer, SETS, SMALL, config)
    learn, calls = SealObjective.learn, []

    def stop(self: SealObjective, rows: list[int], losses: Tensor) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        learn(self, rows, losses)

    with monkeypatch.context() as patch:
        patch.setattr(SealObjective, "learn", stop)
        with pytest.raises(KeyboardInterrupt):
            select(new_model(), tokenizer, SETS, SMALL, config, folder=tmp_path)
    assert select(new_model(), tokenizer, SETS, SMALL, config, folder=tmp_path) == whole


def test_a_selection_in_parts_is_the_one_in_whole(new_model: NewModel, tokenizer: PreTrainedTokenizerFast) -> None:
    whole, parts = (select(new_model(), tokenizer, SETS, SMALL, replace(TRAIN, accumulate=parts)) for parts in (1, 3))
    assert parts.weights == pytest.approx(whole.weights, rel=1e-3)


def test_keeping_every_row_is_plain_tuning_bit_for_bit(new_model: NewModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model, plain = new_model(), new_model()
    defence = Seal(replace(SMALL, keep=1.0)).prepare(model, tokenizer, SETS, TRAIN)
    train(model, tokenizer, defence.recipe(SETS, TRAIN))
    train(plain, tokenizer, SETS.user, TRAIN)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))


def test_the_recipe_tunes_on_the_kept_rows_in_their_order(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    defence = Seal(SMALL).prepare(new_model(), tokenizer, SETS, TRAIN)
    assert defence.selection is not None
    kept = defence.selection.kept
    assert len(kept) == 3
    assert list(defence.recipe(SETS, TRAIN).feeds["user"].rows) == [SETS.user[index] for index in sorted(kept)]
    worst = max(weight for index, weight in enumerate(defence.selection.weights) if index not in kept)
    assert all(defence.selection.weights[index] >= worst for index in kept)


def test_rows_that_stay_hard_lose_weight() -> None:
    objective = SealObjective(config=SealConfig(selector_lr=0.1), rows=4)
    for _ in range(10):
        objective.learn([0, 1, 2, 3], torch.tensor([0.1, 0.2, 0.1, 3.0]))
    weights = objective.weights().tolist()
    assert min(weights) == weights[3] < 0.5
    assert sum(weights) == pytest.approx(4.0)


def test_all_weights_are_one_at_first() -> None:
    assert row_weights(torch.full((5,), 0.1), "softmax").tolist() == pytest.approx([1.0] * 5)
    assert row_weights(torch.zeros(5), "sigmoid").tolist() == pytest.approx([1.0] * 5)
    assert row_weights(torch.tensor([1.0, 0.0]), "sigmoid")[0] == pytest.approx(2 / (1 + 2.718281828**-1))


def test_the_highest_weights_are_kept_and_ties_go_to_the_first() -> None:
    assert kept_rows([0.5, 2.0, 1.0, 1.0, 1.0], 0.6) == (1, 2, 3)
    assert kept_rows([1.0, 1.0, 1.0], 1.0) == (0, 1, 2)
    assert kept_rows([0.1, 0.2], 0.01) == (1,)


def test_the_safe_weight_falls_after_every_pass_and_stops_at_zero() -> None:
    config = SealConfig(safe_weight=1.0, safe_weight_decay=0.4, batch_size=4)
    assert [safe_weight_at(config, step, 8) for step in (0, 1, 2, 4, 6)] == pytest.approx([1.0, 1.0, 0.6, 0.2, 0.0])


def test_row_means_are_per_row_and_know_no_padding(new_model: NewModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model = new_model()
    rows = fit_rows(tokenizer, [SETS.user[0], SETS.safety[0], SETS.user[1]], module=model).rows
    found = row_means(model, batch_of(rows, pad_id=0))
    torch.testing.assert_close(found, torch.stack([_row_loss(model, row) for row in rows]), rtol=1e-5, atol=1e-5)


def test_a_defence_that_was_not_prepared_is_told() -> None:
    with pytest.raises(ConfigError, match=r"call prepare\(module, tokenizer, rows, train\) first"):
        Seal().recipe(SETS, TRAIN)


def test_a_selection_of_other_rows_is_told() -> None:
    defence = Seal(selection=Selection((1.0,), (0,), "other"))
    with pytest.raises(DataError, match="weighed other rows than these"):
        defence.recipe(SETS, TRAIN)


def test_rows_that_were_left_out_are_told(new_model: NewModel, tokenizer: PreTrainedTokenizerFast) -> None:
    long = replace(SETS.user[0], answer="take the brush to the harbour and paint the lamp. " * 6)
    rows = replace(SETS, user=(long, *SETS.user[1:]))
    with pytest.raises(DataError, match=r"(?s)7 rows that fit.*set too_long to 'cut'"):
        select(new_model(), tokenizer, rows, SMALL, replace(TRAIN, too_long="leave out"))


@pytest.mark.parametrize("name", ["keep", "epochs", "lr", "selector_lr"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        SealConfig(**{name: 0.0})


def test_the_users_rows_pull_the_model_by_their_weights(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = new_model()
    rows = fit_rows(tokenizer, SETS.user, module=model).rows
    feeds = Feeds({"user": EncodedFeed(rows, 4, 0)}, pad_id=0, device=torch.device("cpu"), accumulate=2)
    composer = GradientComposer(model, dict(model.named_parameters()), feeds, Replicated(Accelerator(cpu=True)))
    objective = SealObjective(config=SealConfig(), rows=7)
    with torch.no_grad():
        objective.z.copy_(torch.tensor([2.0, -1.0, 0.5, 3.0, -2.0, 0.0, 1.0]))
    weights = objective.weights()
    found = Weighed(objective, 0.4).gradient(composer, Term("weighed", "user", per="row"))
    picked = feeds.indices("user", 0)
    wanted = torch.stack([weights[index] * _row_loss(model, rows[index]) for index in picked]).mean()
    torch.testing.assert_close(found.value, wanted.detach(), rtol=1e-5, atol=1e-6)
    for one, other in zip(found.gradient, torch.autograd.grad(0.4 * wanted, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
