# SPDX-License-Identifier: Apache-2.0
"""Safety mix: counts, shares and the two forms of one gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.harden.safety_mix import SafetyMix, SafetyMixConfig, equal_weight, mix, rows_for_share, share_of
from keelwright.training.config import TrainConfig
from keelwright.training.loop import Run
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.rows import EncodedRow, encode_rows
from keelwright.training.terms import Objective
from keelwright.worlds.workshop.tokenizer import workshop_tokenizer

TOKENIZER = workshop_tokenizer()


def rows_of(name: str, n: int, answer: str = "use the rope.") -> tuple[ChatRow, ...]:
    return tuple(ChatRow(f"{name} {index}", answer) for index in range(n))


@settings(deadline=None, max_examples=60)
@given(n=st.integers(0, 60), pool=st.integers(0, 40), seed=st.integers(0, 5), data=st.data())
def test_counts_are_exact_rows_are_different_and_smaller_mixes_are_nested(
    n: int, pool: int, seed: int, data: st.DataObject
) -> None:
    user, safety = rows_of("user", n), rows_of("safety", pool)
    k = data.draw(st.integers(0, pool))
    fewer = data.draw(st.integers(0, k))
    found = mix(user, safety, k=k, seed=seed)
    assert len(found) == n + k
    assert found[:n] == user
    assert len(set(found[n:])) == k
    assert set(found[n:]) <= set(safety)
    assert mix(user, safety, k=fewer, seed=seed) == found[: n + fewer]


@given(n=st.integers(1, 100_000), k=st.integers(0, 100_000))
def test_a_share_gives_back_its_rows(n: int, k: int) -> None:
    assert rows_for_share(share_of(k, n), n) == k


@given(n=st.integers(1, 5000), share=st.floats(0.0, 0.99))
def test_the_share_of_the_rows_is_the_nearest_there_is(n: int, share: float) -> None:
    k = rows_for_share(share, n)
    assert k >= 0
    assert math.isclose(k, share * n / (1.0 - share), abs_tol=0.5 + 1e-6)


def tiny() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(TOKENIZER),
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=1,
                max_position_embeddings=64,
                bos_token_id=TOKENIZER.bos_token_id,
                eos_token_id=TOKENIZER.eos_token_id,
            )
        )


def run_of(recipe: Recipe, model: LlamaForCausalLM) -> Run:
    encoded: dict[str, list[EncodedRow]] = {
        name: encode_rows(TOKENIZER, feed.rows, module=model) for name, feed in recipe.feeds.items()
    }
    return Run(model, TOKENIZER, dict(model.named_parameters()), encoded, recipe)


def flat_gradient(run: Run, objective: Objective, step: int = 0) -> torch.Tensor:
    composed = run.composer.compose(objective, step)
    return torch.cat([one.flatten() for one in composed.gradient if one is not None])


def test_at_equal_weight_the_two_forms_have_one_gradient_up_to_their_tokens() -> None:
    user, safety = rows_of("say", 6, "5"), rows_of("please", 4, "no, such a deed would harm the village.")
    model, train = tiny(), TrainConfig(batch_size=10)
    mixed = run_of(Recipe({"user": Feed((*user, *safety))}, train), model)
    config = SafetyMixConfig(k=4, borderline=0.0, ordinary=0.0, schedule="rising", safety_batch=4)
    recipe = SafetyMix(config).recipe(RowSets(user=user, safety=safety), TrainConfig(steps=1, batch_size=6))
    weighted = run_of(recipe, model)
    recipe.objective.begin(weighted.setup)
    lambda_ = equal_weight(weighted.feeds)
    assert lambda_ > 1.0, "refusals are longer: the ratio of rows would be 0.67"
    torch.testing.assert_close(
        flat_gradient(weighted, recipe.objective),
        (1 + lambda_) * flat_gradient(mixed, Objective()),
        rtol=1e-4,
        atol=1e-6,
    )


def test_with_rows_of_one_length_and_lambda_k_over_n_the_forms_agree_in_expectation() -> None:
    n, k = 12, 6
    user, safety = rows_of("say", n, "use the rope."), rows_of("please", k, "we must decline.")
    model = tiny()
    mixed = run_of(Recipe({"user": Feed((*user, *safety))}, TrainConfig(batch_size=3)), model)
    config = SafetyMixConfig(k=k, borderline=0.0, ordinary=0.0, lambda_=k / n, safety_batch=1)
    recipe = SafetyMix(config).recipe(RowSets(user=user, safety=safety), TrainConfig(steps=60, batch_size=2))
    weighted = run_of(recipe, model)
    lengths = {row.answer_tokens for feed in weighted.feeds.feeds.values() for row in feed.rows}
    assert len(lengths) == 1
    steps = range(60)
    ours = torch.stack([flat_gradient(weighted, recipe.objective, step) for step in steps]).double()
    plain = torch.stack([flat_gradient(mixed, Objective(), step) for step in steps]).double() * (n + k) / n
    # The difference of two means, entry by entry, in its own standard errors; whole epochs make it smaller still.
    error = ((ours.var(0) + plain.var(0)) / len(steps)).sqrt() + 1e-9
    z = (ours.mean(0) - plain.mean(0)) / error
    assert float(z.square().mean()) < 1.5
    # Without the factor the means are far apart: the test can fail.
    wrong = (ours.mean(0) - plain.mean(0) * n / (n + k)) / error
    assert float(wrong.square().mean()) > 5.0


@pytest.mark.parametrize("k", [0, 3])
def test_the_order_of_plain_tuning_is_kept_byte_for_byte(k: int) -> None:
    user, safety = rows_of("user", 9), rows_of("safety", 5)
    config = SafetyMixConfig(k=k, borderline=0.0, ordinary=0.0, lambda_=1.0 if k else None)
    recipe = SafetyMix(config).recipe(RowSets(user=user, safety=safety), TrainConfig(batch_size=4, seed=5))
    ours = run_of(recipe, tiny())
    plain = run_of(Recipe({"user": Feed(user)}, TrainConfig(batch_size=4, seed=5)), tiny())
    for step in range(10):
        ours_batch, plain_batch = ours.feeds.batches("user", step), plain.feeds.batches("user", step)
        assert [one.input_ids.tolist() for one in ours_batch] == [one.input_ids.tolist() for one in plain_batch]
