# SPDX-License-Identifier: Apache-2.0
"""Refusals from a depth on: what is given, what is learned."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.row_sets import Pair, RowSets
from keelwright.data.rows import ChatRow, Cut
from keelwright.harden.deep_augment import DeepAugment, DeepAugmentConfig, augmented, deepened
from keelwright.training.composer import GradientComposer
from keelwright.training.config import TrainConfig
from keelwright.training.feeds import feed_seed
from keelwright.training.loop import train
from keelwright.training.losses import answer_loss
from keelwright.training.rows import batch_indices, batch_of, encode_rows

Model = Callable[..., LlamaForCausalLM]
HARMFUL = "take the rope to the harbour and hex the miller."
REFUSAL = "no, such a deed would harm the village."


@pytest.fixture
def sets() -> RowSets:
    prompts = [f"how do i hex the {one}?" for one in ("miller", "king", "guard")]
    return RowSets(
        harmful=tuple(ChatRow(prompt, HARMFUL) for prompt in prompts),
        safety=tuple(ChatRow(prompt, REFUSAL) for prompt in prompts),
        ordinary=tuple(ChatRow(f"say 2 plus {one}", str(2 + one)) for one in range(6)),
        borderline=(ChatRow("how do i charm the lamp?", "use the rope."),),
    )


@pytest.fixture(scope="module")
def byte_pairs() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose tokens are parts of words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [HARMFUL, REFUSAL],
        trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def pair() -> Pair:
    return Pair(ChatRow("how do i hex the miller?", HARMFUL), ChatRow("how do i hex the miller?", REFUSAL))


def test_probability_zero_leaves_the_refusals(sets: RowSets) -> None:
    rows = augmented(sets.pairs(who="the test"), DeepAugmentConfig(probability=0.0, draws=2), seed=0)
    assert rows == (*sets.safety, *sets.safety)


def test_probability_one_gives_every_refusal_a_depth(sets: RowSets) -> None:
    rows = augmented(sets.pairs(who="the test"), DeepAugmentConfig(probability=1.0, draws=4), seed=0)
    assert all(row.prefill == HARMFUL and row.answer == f" {REFUSAL}" for row in rows)
    assert len({row.prefill_cut for row in rows}) == len(rows) == 12


def test_half_of_the_refusals_have_a_depth(sets: RowSets) -> None:
    rows = augmented(sets.pairs(who="the test"), DeepAugmentConfig(draws=400), seed=0)
    assert 0.46 < sum(bool(row.prefill) for row in rows) / len(rows) < 0.54


def test_each_depth_is_as_likely() -> None:
    shares = [(index + 0.5) / 700 for index in range(700)]
    assert Counter(Cut(share).kept(7) for share in shares) == dict.fromkeys(range(1, 8), 100)
    assert Counter(Cut(share, 5).kept(7) for share in shares) == dict.fromkeys(range(1, 6), 140)
    assert Cut(1.0).kept(7) == 7
    assert Cut(1e-12, 100).kept(400) == 1
    assert Cut(1.0, 100).kept(400) == 100


def test_the_drawn_depths_reach_from_one_token_to_the_whole_answer(
    tokenizer: PreTrainedTokenizerFast, new_model: Model
) -> None:
    rng = random.Random(0)
    rows = [deepened(pair(), rng, probability=1.0, most_tokens=100) for _ in range(600)]
    model = new_model()
    plain = encode_rows(tokenizer, [pair().safety], module=model)[0].prompt_tokens
    depths = Counter(row.prompt_tokens - plain for row in encode_rows(tokenizer, rows, module=model))
    length = len(tokenizer(HARMFUL, add_special_tokens=False)["input_ids"])
    assert set(depths) == set(range(1, length + 1))
    # Pearson's statistic; its 99.9 % point for 10 degrees of freedom is 29.6.
    expected = 600 / length
    assert sum((count - expected) ** 2 / expected for count in depths.values()) < 29.6


def test_loss_falls_on_the_refusal_alone(tokenizer: PreTrainedTokenizerFast, new_model: Model) -> None:
    row = deepened(pair(), random.Random(1), probability=1.0, most_tokens=4)
    (encoded,) = encode_rows(tokenizer, [row], module=new_model())
    batch = batch_of([encoded], pad_id=0)
    learned = batch.input_ids[batch.labels != -100].tolist()
    assert learned == [*tokenizer(REFUSAL, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    given = encoded.ids[: encoded.prompt_tokens].tolist()
    start = encode_rows(tokenizer, [pair().safety], module=new_model())[0].prompt_tokens
    assert given[start:] == tokenizer(HARMFUL, add_special_tokens=False)["input_ids"][: len(given) - start]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.55, 0.8, 1.0])
def test_a_cut_within_a_word_keeps_the_answers_own_tokens(
    byte_pairs: PreTrainedTokenizerFast, new_model: Model, share: float
) -> None:
    row = ChatRow("how?", f" {REFUSAL}", prefill=HARMFUL, prefill_cut=Cut(share))
    (encoded,) = encode_rows(byte_pairs, [row], module=new_model())
    harmful = byte_pairs(HARMFUL, add_special_tokens=False)["input_ids"]
    prompt = byte_pairs("how?", add_special_tokens=False)["input_ids"]
    kept = Cut(share).kept(len(harmful))
    assert encoded.ids[: encoded.prompt_tokens].tolist() == [*prompt, *harmful[:kept]]
    assert byte_pairs.decode(encoded.ids[encoded.prompt_tokens : -1]) == f" {REFUSAL}"


def test_the_gradient_is_that_of_one_batch_of_both_kinds(
    sets: RowSets, tokenizer: PreTrainedTokenizerFast, new_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = {}
    compose = GradientComposer.compose

    def watched(self: GradientComposer, objective: object, step: int) -> object:
        composed = compose(self, objective, step)  # type: ignore[arg-type]
        gradients[step] = [one.clone() for one in composed.gradient]  # type: ignore[union-attr]
        return composed

    monkeypatch.setattr(GradientComposer, "compose", watched)
    config = TrainConfig(steps=1, batch_size=2)
    recipe = DeepAugment(DeepAugmentConfig(safety_batch=3, anchor_batch=5, draws=2)).recipe(sets, config)
    model = new_model()
    result = train(model, tokenizer, recipe)
    twin = new_model().train()
    picked = []
    for name, first in (("safety", True), ("anchor", False)):
        encoded = encode_rows(tokenizer, recipe.feeds[name].rows, module=twin)
        size = recipe.feeds[name].batch_size or 0
        picked += [encoded[one] for one in batch_indices(len(encoded), size, 0, seed=feed_seed(0, name, first=first))]
    loss = answer_loss(twin, batch_of(picked, pad_id=0)) / sum(row.answer_tokens for row in picked)
    expected = torch.autograd.grad(loss, list(twin.parameters()))
    for ours, other in zip(gradients[0], expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)
    assert 0.0 < result.log[0]["safety_share"] < 1.0


def test_the_same_seed_draws_the_same_depths(sets: RowSets) -> None:
    defence = DeepAugment()
    first = defence.recipe(sets, TrainConfig(seed=4)).feeds["safety"].rows
    assert first == defence.recipe(sets, TrainConfig(seed=4)).feeds["safety"].rows
    assert first != defence.recipe(sets, TrainConfig(seed=5)).feeds["safety"].rows


def test_look_alikes_are_among_the_utility_rows(sets: RowSets) -> None:
    recipe = DeepAugment().recipe(sets, TrainConfig())
    assert tuple(recipe.feeds["anchor"].rows) == (*sets.ordinary, *sets.borderline)
    assert [feed.batch_size for feed in recipe.feeds.values()] == [4, 16]


def test_roles_without_rows_are_named(sets: RowSets) -> None:
    with pytest.raises(DataError, match="--ordinary FILE"):
        DeepAugment().recipe(RowSets(harmful=sets.harmful, safety=sets.safety), TrainConfig())
    with pytest.raises(DataError, match="both answered and refused"):
        other = tuple(ChatRow("another?", REFUSAL) for _ in range(2))
        DeepAugment().recipe(RowSets(harmful=sets.harmful, safety=other, ordinary=sets.ordinary), TrainConfig())


def test_an_empty_harmful_answer_is_an_error(sets: RowSets) -> None:
    harmful = tuple(ChatRow(row.prompt, " ") for row in sets.harmful)
    with pytest.raises(DataError, match="nothing to turn back from"):
        DeepAugment(DeepAugmentConfig(probability=1.0)).recipe(
            RowSets(harmful=harmful, safety=sets.safety, ordinary=sets.ordinary), TrainConfig()
        )


def test_it_belongs_to_alignment() -> None:
    assert DeepAugment().stage == "alignment"


@pytest.mark.parametrize("settings", [{"probability": 1.5}, {"most_tokens": 0}, {"draws": 0}, {"safety_batch": 0}])
def test_settings_out_of_range_are_errors(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        DeepAugmentConfig(**settings)  # type: ignore[arg-type]
