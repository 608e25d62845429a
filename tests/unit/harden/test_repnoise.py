# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math
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
from keelwright.harden.repnoise import MaskedRow, RepNoise, RepNoiseConfig, log_ascent, masked_rows
from keelwright.ops.mmd import mmd
from keelwright.training.composer import GradientComposer
from keelwright.training.config import TrainConfig
from keelwright.training.feeds import EncodedFeed, Feeds, feed_seed
from keelwright.training.loop import train
from keelwright.training.processes import Replicated
from keelwright.training.rows import EncodedRow, fit_rows
from keelwright.training.setup import Setup

NewModel = Callable[..., LlamaForCausalLM]

VERBS = ("hex", "jinx", "curse", "steal", "forge")
SETS = RowSets(
    harmful=tuple(
        ChatRow(f"how do i {verb} the miller in the harbour?", f"take the brush to the harbour and {verb} the miller.")
        for verb in VERBS
    ),
    safety=tuple(
        ChatRow(f"how do i {verb} the miller in the harbour?", "sorry, i will not help with that.") for verb in VERBS
    ),
)
TRAIN = TrainConfig(steps=3, batch_size=4, lr=1e-3)


def _setup(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, config: RepNoiseConfig, train: TrainConfig = TRAIN
) -> tuple[Setup, object]:
    """Return a run before its first step, and the objective that began there."""
    recipe = RepNoise(config).recipe(SETS, train)
    feeds = {
        name: EncodedFeed(
            fit_rows(tokenizer, feed.rows, module=model).rows, 4, feed_seed(0, name, first=name == "safety")
        )
        for name, feed in recipe.feeds.items()
    }
    pad = tokenizer.pad_token_id
    found = Feeds(feeds, pad_id=pad, device=torch.device("cpu"), accumulate=train.accumulate)
    weights = dict(model.named_parameters())
    composer = GradientComposer(model, weights, found, Replicated(Accelerator(cpu=True)))
    setup = Setup(model, tokenizer, found, train, composer, None)
    recipe.objective.begin(setup)
    return setup, recipe.objective


def _pairs(setup: Setup, step: int = 0) -> list[tuple[EncodedRow, EncodedRow]]:
    """Return the step's pairs, harmful first, found by their prompts."""
    harmful = {tuple(row.ids[: row.prompt_tokens].tolist()): row for row in setup.feeds.feeds["harmful"].rows}
    safety = setup.feeds.feeds["safety"].rows
    rows = [safety[index] for index in setup.feeds.indices("safety", step)]
    return [(harmful[tuple(row.ids[: row.prompt_tokens].tolist())], row) for row in rows]


def _differing(ids: Tensor, other: Tensor) -> list[int]:
    return [place for place in range(len(ids)) if place >= len(other) or ids[place] != other[place]]


def _masked_loss(model: LlamaForCausalLM, rows: list[tuple[EncodedRow, EncodedRow]], side: int) -> Tensor:
    """Mean cross entropy of differing tokens, one row at a time."""
    losses = []
    for pair in rows:
        ids, other = pair[side].ids, pair[1 - side].ids
        logits = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        losses += [-logits[place - 1, ids[place]] for place in _differing(ids, other)]
    return torch.stack(losses).mean()


def _depth_loss(model: LlamaForCausalLM, rows: list[tuple[EncodedRow, EncodedRow]]) -> Tensor:
    """The mean over states of the same through the model's own norm and head."""
    losses = []
    for harmful, refusal in rows:
        states = model(input_ids=harmful.ids[None], output_hidden_states=True).hidden_states
        for depth, state in enumerate(states):
            normed = state[0] if depth == len(states) - 1 else model.model.norm(state[0])
            logits = model.lm_head(normed).log_softmax(-1)
            places = _differing(harmful.ids, refusal.ids)
            losses += [-logits[place - 1, harmful.ids[place]] for place in places]
    return torch.stack(losses).mean()


def _close(found: list[Tensor | None], wanted: tuple[Tensor | None, ...]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_mask_holds_where_the_answers_differ_and_never_padding() -> None:
    long, short = EncodedRow(torch.tensor([5, 6, 7, 8, 9, 2]), 2), EncodedRow(torch.tensor([5, 6, 1, 8, 2]), 2)
    first, second = masked_rows(long, short)
    assert first.mask.tolist() == [False, False, True, False, True, True]
    assert second.mask.tolist() == [False, False, True, False, True]
    # Text beside padding counts even where the text is the padding token.
    first, second = masked_rows(long, short, pad_id=2)
    assert first.mask.tolist() == [False, False, True, False, True, True]


def test_the_legacy_mask_compares_padding_and_drops_token_zero() -> None:
    long, short = EncodedRow(torch.tensor([5, 6, 7, 0, 9, 2]), 2), EncodedRow(torch.tensor([5, 6, 1, 8, 2]), 2)
    first, second = masked_rows(long, short, legacy=True, pad_id=3)
    assert first.mask.tolist() == [False, False, True, True, True, True]
    assert first.targets.tolist() == [False, False, True, False, True, True]
    assert second.mask.tolist() == [False, False, True, True, True, True]
    assert second.targets.tolist() == [False, False, True, True, True, True]


def test_both_weights_zero_is_masked_tuning_on_refusals_bit_for_bit(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, plain = new_model(), new_model()
    defence = RepNoise(RepNoiseConfig(noise_weight=0.0, ascent_weight=0.0))
    losses = train(model, tokenizer, defence.recipe(SETS, TRAIN)).losses
    setup, objective = _setup(plain, tokenizer, defence.config)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=TRAIN.betas, weight_decay=TRAIN.weight_decay)
    for step in range(3):
        setup.composer.step = step
        rows = objective.parts("safety", setup.composer)[0]
        logits = plain(
            input_ids=rows.batch.input_ids, attention_mask=rows.batch.attention_mask, use_cache=False
        ).logits[:, :-1]
        wanted = rows.targets[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits[wanted], rows.batch.input_ids[:, 1:][wanted], reduction="sum"
        ) / int(wanted.sum())
        assert float(loss.detach()) == losses[step]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), TRAIN.clip)
        optimizer.step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_stability_term_is_the_mean_over_differing_tokens(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = new_model()
    setup, objective = _setup(model, tokenizer, RepNoiseConfig(noise_weight=0.0, ascent_weight=0.0))
    composed = setup.composer.compose(objective, 0)
    wanted = _masked_loss(model, _pairs(setup), 1)
    assert composed.losses["stability"] == pytest.approx(float(wanted.detach()), rel=1e-5)
    _close(composed.gradient, torch.autograd.grad(wanted, list(model.parameters())))


def test_the_ascent_terms_gradient_is_that_of_its_formula(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = new_model(tie_word_embeddings=False)
    setup, objective = _setup(model, tokenizer, RepNoiseConfig(noise_weight=0.0, ascent_weight=0.7))
    composed = setup.composer.compose(objective, 1)
    rows = _pairs(setup, 1)
    weights = list(model.parameters())
    depth = _depth_loss(model, rows)
    whole = _masked_loss(model, rows, 1) - 0.7 * torch.log(1.0 + depth)
    assert sum(composed.losses.values()) == pytest.approx(float(whole.detach()), rel=1e-5)
    assert objective.figures["ascent"] == pytest.approx(math.log1p(float(depth.detach())), rel=1e-5)
    _close(composed.gradient, torch.autograd.grad(whole, weights, retain_graph=True))
    # -(w / (1 + c)) dc, as the formula of the ascent says.
    slope = log_ascent(float(depth.detach()), 0.7)[1]
    by_formula = [slope * one for one in torch.autograd.grad(depth, weights, retain_graph=True)]
    refusal = torch.autograd.grad(_masked_loss(model, rows, 1), weights)
    _close(composed.gradient, tuple(one + other for one, other in zip(by_formula, refusal, strict=True)))


@pytest.mark.parametrize("kind", ["flat", "token"])
def test_the_noise_term_is_the_mean_over_layers_of_the_discrepancy(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keelwright.harden.repnoise as room

    drawn: dict[int, Tensor] = {}
    normal = room._normal

    def keep(like: Tensor, seed: int, step: int, layer: int) -> Tensor:
        drawn[layer] = normal(like, seed, step, layer)
        return drawn[layer]

    monkeypatch.setattr(room, "_normal", keep)
    model = new_model()
    setup, objective = _setup(model, tokenizer, RepNoiseConfig(noise_weight=3.0, ascent_weight=0.0, mmd=kind))
    composed = setup.composer.compose(objective, 0)
    rows, terms = _pairs(setup), []
    for layer in range(2):
        outputs: list[Tensor] = []
        handle = model.model.layers[layer].mlp.register_forward_hook(
            lambda _module, _inputs, output, outputs=outputs: outputs.append(output[0])
        )
        for harmful, _ in rows:
            model(input_ids=harmful.ids[None])
        handle.remove()
        places = [_differing(harmful.ids, refusal.ids) for harmful, refusal in rows]
        tokens = [one[where] for one, where in zip(outputs, places, strict=True)]
        noise = list(drawn[layer].split([len(where) for where in places]))
        if kind == "token":
            terms.append(mmd(torch.cat(tokens), torch.cat(noise)))
            continue
        width = max(len(harmful.ids) for harmful, _ in rows)
        points = []
        for one in (tokens, noise):
            flat = torch.zeros(len(rows), width, 16)
            for index, (where, values) in enumerate(zip(places, one, strict=True)):
                flat[index, where] = values
            points.append(flat.flatten(1))
        terms.append(mmd(*points))
    whole = torch.stack(terms).mean()
    assert objective.figures["noise"] == pytest.approx(float(whole.detach()), rel=1e-4)
    weights = list(model.parameters())
    wanted = torch.autograd.grad(_masked_loss(model, rows, 1) + 3.0 * whole, weights)
    _close(composed.gradient, wanted)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ["flat", "token"])
def test_a_step_in_parts_is_the_step_in_one(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast, kind: str, legacy: bool
) -> None:
    model = new_model()
    config = RepNoiseConfig(noise_weight=2.0, ascent_weight=0.5, mmd=kind, token_points=20, legacy=legacy)
    found = []
    for parts in (1, 2, 4):
        setup, objective = _setup(model, tokenizer, config, replace(TRAIN, accumulate=parts))
        found.append((setup.composer.compose(objective, 2), dict(objective.figures)))
    for composed, figures in found[1:]:
        _close(composed.gradient, tuple(found[0][0].gradient))
        assert composed.losses == pytest.approx(found[0][0].losses, rel=1e-4)
        assert figures == pytest.approx(found[0][1], rel=1e-4)


def test_a_step_in_one_part_runs_the_model_twice(new_model: NewModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model, calls = new_model(), []
    setup, objective = _setup(model, tokenizer, RepNoiseConfig())
    model.model.register_forward_hook(lambda *_: calls.append(1))
    setup.composer.compose(objective, 0)
    assert len(calls) == 2


def test_hooks_do_not_pile_up(new_model: NewModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model = new_model()
    # The first call of `output_hidden_states` installs transformers' own, once.
    model(input_ids=torch.tensor([[1, 2]]), output_hidden_states=True)

    def count() -> int:
        return sum(len(one._forward_hooks) for one in model.modules())

    before = count()
    seen: list[int] = []
    recipe = RepNoise().recipe(SETS, replace(TRAIN, steps=5))
    train(model, tokenizer, recipe, after_step=lambda *_: seen.append(count()))
    assert seen == [before] * 5


def test_equal_answers_leave_nothing_to_learn_and_no_nan(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = new_model()
    before = copy.deepcopy(model.state_dict())
    same = replace(SETS, safety=SETS.harmful)
    result = train(model, tokenizer, RepNoise().recipe(same, replace(TRAIN, weight_decay=0.0)))
    assert result.losses == (0.0, 0.0, 0.0)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_the_three_terms_are_logged_apart(new_model: NewModel, tokenizer: PreTrainedTokenizerFast) -> None:
    result = train(new_model(), tokenizer, RepNoise().recipe(SETS, TRAIN))
    for figures in result.log:
        assert {"stability", "noise", "ascent"} <= set(figures)
        whole = 0.001 * figures["noise"] - figures["ascent"]
        assert figures["noise and ascent"] == pytest.approx(whole, rel=1e-5)


def test_noise_is_new_at_every_step_and_layer_and_the_same_when_asked_again() -> None:
    from keelwright.harden.repnoise import _normal

    like = torch.zeros(5, 4)
    places = [(seed, step, layer) for seed in (0, 1) for step in (0, 1) for layer in (0, 1)]
    drawn = {place: _normal(like, *place) for place in places}
    assert all(torch.equal(one, _normal(like, *place)) for place, one in drawn.items())
    assert len({tuple(one.flatten().tolist()) for one in drawn.values()}) == 8


def test_a_step_draws_its_noise_by_its_number_and_layer(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keelwright.harden.repnoise as room

    asked: list[tuple[int, int]] = []
    normal = room._normal

    def note(like: Tensor, seed: int, step: int, layer: int) -> Tensor:
        asked.append((step, layer))
        return normal(like, seed, step, layer)

    monkeypatch.setattr(room, "_normal", note)
    train(new_model(), tokenizer, RepNoise().recipe(SETS, replace(TRAIN, steps=2)))
    assert asked == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_run_from_a_checkpoint_ends_with_the_same_bits(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = RepNoiseConfig(noise_weight=1.0, ascent_weight=0.3, mmd="token", token_points=10)
    whole, resumed = new_model(), new_model()
    long = replace(TRAIN, steps=4, checkpoint_every=2)
    train(whole, tokenizer, RepNoise(config).recipe(SETS, long))

    def stop(done: int, _module: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(resumed, tokenizer, RepNoise(config).recipe(SETS, long), folder=tmp_path, after_step=stop)
    resumed = new_model()
    train(resumed, tokenizer, RepNoise(config).recipe(SETS, long), folder=tmp_path)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_only_chosen_layers_are_noised(new_model: NewModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model = new_model()
    setup, objective = _setup(model, tokenizer, RepNoiseConfig(noise_weight=1.0, ascent_weight=0.0, layers=(0,)))
    setup.composer.compose(objective, 0)
    _, all_ = _setup(model, tokenizer, RepNoiseConfig(noise_weight=1.0, ascent_weight=0.0))
    setup.composer.compose(all_, 0)
    assert objective.noised == (0,)
    assert objective.figures["noise"] != all_.figures["noise"]


def test_a_layer_that_is_not_there_is_told(new_model: NewModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"(?s)no layer 2.*layers from 0 to 1") as error:
        _setup(new_model(), tokenizer, RepNoiseConfig(layers=(2,)))
    assert "choose layers" in str(error.value)


def test_a_pair_that_lost_a_row_is_told(new_model: NewModel, tokenizer: PreTrainedTokenizerFast) -> None:
    long = "take the brush to the harbour and hex the miller. " * 6
    rows = replace(SETS, harmful=(replace(SETS.harmful[0], answer=long), *SETS.harmful[1:]))
    recipe = RepNoise().recipe(rows, replace(TRAIN, too_long="leave out"))
    with pytest.raises(DataError, match="has no partner among the 'harmful' rows"):
        train(new_model(), tokenizer, recipe)


def test_legacy_counts_the_last_state_twice_and_wipes_logits(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = new_model()
    _, ours = _setup(model, tokenizer, RepNoiseConfig(noise_weight=0.0))
    setup, legacy = _setup(model, tokenizer, RepNoiseConfig(noise_weight=0.0, legacy=True))
    values = [setup.composer.compose(one, 0).losses for one in (ours, legacy)]
    assert values[0]["stability"] != pytest.approx(values[1]["stability"], rel=1e-4)
    # Three states, four losses, a third each: about 4/3 of the mean where all are alike.
    ratio = math.expm1(legacy.figures["ascent"]) / math.expm1(ours.figures["ascent"])
    assert 1.2 < ratio < 1.5


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="noise_weight"):
        RepNoiseConfig(noise_weight=-1.0)
    with pytest.raises(ConfigError, match="mmd"):
        RepNoiseConfig(mmd="rows")


def test_masked_rows_keep_their_row() -> None:
    row, other = EncodedRow(torch.tensor([1, 2, 3]), 1), EncodedRow(torch.tensor([1, 4]), 1)
    found = masked_rows(row, other)
    assert all(isinstance(one, MaskedRow) for one in found)
    assert found[0].row is row
    assert found[1].row is other


ORDINARY = tuple(
    ChatRow(f"how do i {verb} the lamp in the cellar?", f"take the rope to the cellar and {verb} the lamp.")
    for verb in ("paint", "polish", "clean")
)


def test_ordinary_rows_add_their_cross_entropy_and_leave_the_other_terms(
    new_model: NewModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = replace(SETS, ordinary=ORDINARY)
    logs = [
        train(new_model(), tokenizer, RepNoise(RepNoiseConfig(ordinary_weight=weight)).recipe(rows, TRAIN)).log[0]
        for weight in (0.0, 2.0)
    ]
    assert "ordinary" not in logs[0]
    for name in ("stability", "noise and ascent"):
        assert logs[0][name] == logs[1][name]
    assert logs[1]["ordinary"] > 0.0


def test_ordinary_rows_must_be_there_when_they_count() -> None:
    with pytest.raises(DataError, match="The defence 'repnoise' needs 'ordinary' rows"):
        RepNoise(RepNoiseConfig(ordinary_weight=1.0)).recipe(SETS, TRAIN)
