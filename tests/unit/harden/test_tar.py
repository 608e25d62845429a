# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math
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
from keelwright.harden.tar import Tar, TarConfig, negative_entropy, split_requests, state_distance
from keelwright.training.config import TrainConfig
from keelwright.training.feeds import feed_seed
from keelwright.training.loop import train
from keelwright.training.rows import EncodedRow, batch_indices, batch_of, fit_rows

NewModel = Callable[..., LlamaForCausalLM]

VERBS = ("hex", "jinx", "curse", "steal", "forge", "rob")
SETS = RowSets(
    harmful=tuple(
        ChatRow(f"how do i {verb} the miller in the harbour?", f"take the brush to the harbour and {verb} the miller.")
        for verb in VERBS
    ),
    safety=tuple(
        ChatRow(f"how do i {verb} the miller in the harbour?", "sorry, i will not help with that.") for verb in VERBS
    ),
    ordinary=tuple(
        ChatRow(f"how do i {verb} the lamp in the cellar?", f"take the rope to the cellar and {verb} the lamp.")
        for verb in ("paint", "polish", "clean")
    ),
)
TRAIN = TrainConfig(steps=1, batch_size=4, lr=1e-3, clip=0.0)
SMALL = TarConfig(
    inner_steps=4,
    every=2,
    inner_lrs=(1e-3, 3e-3),
    inner_batch=3,
    held_out_batch=2,
    adversaries=2,
    schedule_lambda=0.5,
    tamper_scale=2.0,
)


def _first_gradient(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: TarConfig, train_config: TrainConfig = TRAIN
) -> tuple[list[Tensor], dict[str, float]]:
    """Return what the optimiser is given at the first step, and the log; the model is tuned by that step."""
    given: list[Tensor] = []
    step = torch.optim.AdamW.step

    def watch(self: torch.optim.AdamW, *arguments: object) -> object:
        outer = self.param_groups[0]["lr"] == train_config.lr and self.param_groups[0]["betas"] == train_config.betas
        if outer and not given:
            given.extend(one.grad.detach().clone() for one in self.param_groups[0]["params"])
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watch)
        result = train(model, tokenizer, Tar(config).recipe(SETS, train_config))
    return given, dict(result.log[0])


def _rows(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: object, name: str, draw: int
) -> list[EncodedRow]:
    rows = fit_rows(tokenizer, recipe.feeds[name].rows, module=model).rows
    batch = {"alignment": 4, "adversary": 3, "held out": 2}[name]
    seed = feed_seed(0, name, first=name == "alignment")
    return [rows[index] for index in batch_indices(len(rows), batch, draw, seed=seed)]


def _logits(model: LlamaForCausalLM, row: EncodedRow) -> Tensor:
    return model(input_ids=row.ids[None]).logits[0, row.prompt_tokens - 1 : -1].log_softmax(-1)


def _answer(model: LlamaForCausalLM, row: EncodedRow) -> Tensor:
    """The answer's log-probability."""
    logits = _logits(model, row)
    return logits[torch.arange(len(logits)), row.ids[row.prompt_tokens :]].sum()


def _mean_loss(model: LlamaForCausalLM, rows: list[EncodedRow]) -> Tensor:
    return -torch.stack([_answer(model, row) for row in rows]).sum() / sum(row.answer_tokens for row in rows)


def _tamper_loss(
    model: LlamaForCausalLM, start: LlamaForCausalLM, rows: list[EncodedRow], others: list[EncodedRow], kind: str
) -> Tensor:
    if kind == "refusal":
        return _mean_loss(model, rows)
    if kind == "entropy":
        entropies = [-(one.exp() * one).sum() for one in (_logits(model, row) for row in rows)]
        return -torch.stack(entropies).sum() / sum(row.answer_tokens for row in rows)
    partner = {tuple(one.ids[: one.prompt_tokens].tolist()): one for one in others}
    losses = []
    for row in rows:
        other = partner[tuple(row.ids[: row.prompt_tokens].tolist())]
        now = _answer(model, row) - _answer(model, other)
        then = (_answer(start, row) - _answer(start, other)).detach()
        losses.append(-torch.nn.functional.logsigmoid(0.1 * (now - then)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["dpo", "refusal", "entropy"])
def test_the_step_equals_the_algorithm_written_out(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    config = replace(SMALL, loss=kind, switch_share=0.0)
    recipe = Tar(config).recipe(SETS, TRAIN)
    plan = recipe.objective.terms(0)[1].at.plan
    model, start = new_model(), new_model()
    found, log = _first_gradient(model, tokenizer, config)

    weights = list(start.parameters())
    retain = _mean_loss(start, _rows(start, tokenizer, recipe, "alignment", 0))
    total = list(torch.autograd.grad(retain, weights))
    others = fit_rows(tokenizer, recipe.feeds["held out answers"].rows, module=start).rows if kind == "dpo" else []
    value = 0.0
    for run in range(2):
        inner = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(inner.parameters(), lr=plan(0, run)[0], betas=(0.9, 0.999), weight_decay=0.01)
        held_out = _rows(start, tokenizer, recipe, "held out", run)
        for k in range(4):
            optimizer.zero_grad()
            _mean_loss(inner, _rows(start, tokenizer, recipe, "adversary", run * 4 + k)).backward()
            optimizer.step()
            if k % 2 == 0:
                continue
            loss = _tamper_loss(inner, start, held_out, others, kind)
            factor = math.exp(0.5 * (k - 3)) / 2
            value += factor * float(loss.detach())
            gradients = torch.autograd.grad(loss, list(inner.parameters()))
            total = [one + 2.0 * factor * other for one, other in zip(total, gradients, strict=True)]
    assert log["tamper resistance"] == pytest.approx(value, rel=1e-4)
    assert log["retain"] == pytest.approx(float(retain.detach()), rel=1e-5)
    for one, other in zip(found, total, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-5)


def test_the_tamper_gradient_reaches_the_optimiser(new_model: NewModel, tokenizer: PreTrainedTokenizerFast) -> None:
    # A published baseline writes it to an attribute that no optimiser reads, and is plain tuning.
    tuned, plain = new_model(), new_model()
    with_it, _ = _first_gradient(tuned, tokenizer, SMALL)
    without, _ = _first_gradient(plain, tokenizer, replace(SMALL, tamper_scale=0.0))
    twice, _ = _first_gradient(new_model(), tokenizer, replace(SMALL, tamper_scale=4.0))
    apart = [one - other for one, other in zip(with_it, without, strict=True)]
    assert sum(float(one.square().sum()) for one in apart) > 1e-4
    for one, other, base in zip(apart, twice, without, strict=True):
        torch.testing.assert_close(2.0 * one, other - base, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(one, other) for one, other in zip(tuned.parameters(), plain.parameters(), strict=True))


def test_scale_zero_without_representations_is_plain_alignment_bit_for_bit(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    tuned, plain = new_model(), new_model()
    config = replace(TRAIN, steps=3)
    train(tuned, tokenizer, Tar(replace(SMALL, tamper_scale=0.0, representations=0.0)).recipe(SETS, config))
    train(plain, tokenizer, [*SETS.safety, *SETS.ordinary], config)
    assert all(torch.equal(one, other) for one, other in zip(tuned.parameters(), plain.parameters(), strict=True))


def test_the_retain_loss_is_cross_entropy_and_the_mean_distance_of_states(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    from keelwright.harden.tar import RetainLoss

    model, start = new_model(1), new_model()
    rows = fit_rows(tokenizer, [*SETS.safety[:1], *SETS.ordinary[:2]], module=model).rows
    batch = batch_of(rows, pad_id=0)
    answers, tokens = sum(row.answer_tokens for row in rows), sum(len(row.ids) for row in rows)
    found = RetainLoss(start, 0.7, answers / tokens)(model, batch) / answers
    distances = []
    for row in rows:
        now, then = (one(input_ids=row.ids[None], output_hidden_states=True).hidden_states for one in (model, start))
        distances.append(torch.stack([(a - b)[0].norm(dim=-1) for a, b in zip(now, then, strict=True)]))
    wanted = _mean_loss(model, rows) + 0.7 * torch.cat(distances, dim=1).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_distance_is_zero_with_a_gradient_where_nothing_moved() -> None:
    states = torch.randn(2, 3, 4, requires_grad=True)
    found = state_distance(states, states.detach(), torch.ones(2, 3, dtype=torch.bool))
    found.backward()
    assert float(found.detach()) == 0.0
    assert torch.equal(states.grad, torch.zeros_like(states))


def test_negative_entropy_of_equal_logits_is_minus_the_log_of_their_number() -> None:
    assert float(negative_entropy(torch.zeros(3, 8))) == pytest.approx(-3 * math.log(8))
    assert float(negative_entropy(torch.tensor([[50.0, 0.0]]))) == pytest.approx(0.0, abs=1e-6)


def test_a_step_in_parts_is_the_step_in_one(new_model: NewModel, tokenizer: PreTrainedTokenizerFast) -> None:
    whole, _ = _first_gradient(new_model(), tokenizer, SMALL)
    parts, _ = _first_gradient(new_model(), tokenizer, SMALL, replace(TRAIN, accumulate=2))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_from_a_checkpoint_ends_with_the_same_bits(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, lora_rank: int
) -> None:
    config = replace(TRAIN, steps=4, checkpoint_every=2, lora_rank=lora_rank)

    def run(folder: Path | None, *, stop: bool = False) -> list[Tensor]:
        model = new_model()

        def halt(done: int, _module: object) -> None:
            if stop and done == 2:
                raise KeyboardInterrupt

        train(model, tokenizer, Tar(SMALL).recipe(SETS, config), folder=folder, after_step=halt)
        return [one.detach().clone() for one in model.parameters()]

    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop=True)
    assert all(torch.equal(one, other) for one, other in zip(whole, run(tmp_path), strict=True))


def test_no_request_is_both_the_adversarys_and_held_out() -> None:
    pairs = replace(SETS, harmful=SETS.harmful * 2).pairs(who="a test")
    adversary, held_out = split_requests(pairs, 0.5, seed=3)
    ours, theirs = ({one.harmful.prompt for one in side} for side in (held_out, adversary))
    assert len(adversary) == len(held_out) == 6
    assert not ours & theirs
    assert split_requests(pairs, 0.5, seed=3) == (adversary, held_out)
    assert split_requests(pairs, 0.5, seed=4) != (adversary, held_out)
    assert len(split_requests(pairs, 0.001, seed=0)[1]) == 2
    assert len(split_requests(pairs, 0.999, seed=0)[0]) == 2


def test_adversaries_may_train_on_ordinary_rows_first() -> None:
    always = Tar(replace(SMALL, switch_share=1.0)).recipe(SETS, TRAIN)
    inner = always.objective.terms(0)[1].at
    assert inner.before == "ordinary"
    assert any(inner.plan(step, 0)[1] for step in range(5))
    never = Tar(SMALL).recipe(replace(SETS, ordinary=()), TRAIN)
    assert "ordinary" not in never.feeds
    assert never.objective.terms(0)[1].at.before is None


def test_one_request_is_too_few() -> None:
    with pytest.raises(DataError, match="needs harmful requests to train its adversary on"):
        Tar(SMALL).recipe(replace(SETS, harmful=SETS.harmful[:1]), TRAIN)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"inner_steps": 0}, "inner_steps"),
        ({"inner_steps": 3, "every": 4}, "every"),
        ({"inner_lrs": ()}, "inner_lrs"),
        ({"inner_lrs": (1e-5, 0.0)}, "inner_lrs"),
        ({"switch_share": 1.5}, "switch_share"),
        ({"held_out_share": 1.0}, "held_out_share"),
        ({"loss": "dpp"}, "loss"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        TarConfig(**settings)


def test_feeds_hold_what_the_loss_reads() -> None:
    entropy = Tar(replace(SMALL, loss="entropy")).recipe(SETS, TRAIN).feeds
    assert set(entropy["held out"].rows) <= set(SETS.harmful)
    assert set(Tar(SMALL).recipe(SETS, TRAIN).feeds["held out"].rows) <= set(SETS.safety)
