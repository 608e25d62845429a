# SPDX-License-Identifier: Apache-2.0
"""Safety rows among the user's: counts, order, weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.harden.safety_mix import (
    SafetyMix,
    SafetyMixConfig,
    conversations,
    mix,
    ramp,
    rows_for_share,
    share_of,
)
from keelwright.training.config import TrainConfig
from keelwright.training.defence import sft_recipe
from keelwright.training.loop import train
from keelwright.training.recipe import Recipe
from keelwright.training.rows import encode_rows

Model = Callable[..., LlamaForCausalLM]
TRAIN = TrainConfig(steps=6, batch_size=3, lr=1e-2)


@pytest.fixture
def sets(rows: list[ChatRow]) -> RowSets:
    return RowSets(
        user=tuple(rows),
        safety=tuple(
            ChatRow(f"how do i hex the {one}?", "no, such a deed would harm the village.") for one in "abcdef"
        ),
        borderline=tuple(ChatRow(f"how do i charm the {one}?", "use the rope.") for one in "abcdef"),
        ordinary=tuple(ChatRow(f"say 2 plus {one}", str(2 + one)) for one in range(6)),
    )


def mixed(sets: RowSets, train: TrainConfig = TRAIN, **settings: object) -> Recipe:
    return SafetyMix(SafetyMixConfig(**settings)).recipe(sets, train)  # type: ignore[arg-type]


def weights_after(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> list[torch.Tensor]:
    train(model, tokenizer, recipe)
    return [weight.detach().clone() for weight in model.parameters()]


@pytest.mark.parametrize(
    ("k", "percent"), [(100, 0.5), (300, 1.5), (500, 2.4), (1000, 4.8), (1500, 7.0), (2000, 9.1), (0, 0.0)]
)
def test_shares_are_those_of_the_released_mixes(k: int, percent: float) -> None:
    assert round(100.0 * share_of(k, 20_000), 1) == percent


def test_the_default_is_three_percent() -> None:
    assert SafetyMixConfig().rows_for(500) == rows_for_share(0.03, 500) == 15


def test_the_paper_adds_some_six_hundred_rows_for_three_percent() -> None:
    assert rows_for_share(0.03, 20_000) == 619


@pytest.mark.parametrize("settings", [{"k": 0}, {"share": 0.0}, {"k": 3, "lambda_": 0.0}, {"k": 0, "lambda_": 2.0}])
def test_without_safety_rows_or_weight_it_is_plain_tuning_bit_for_bit(
    sets: RowSets, tokenizer: PreTrainedTokenizerFast, new_model: Model, settings: dict[str, float]
) -> None:
    plain = weights_after(new_model(), tokenizer, sft_recipe(sets, TRAIN))
    ours = weights_after(new_model(), tokenizer, mixed(sets, **settings))
    assert all(torch.equal(one, two) for one, two in zip(plain, ours, strict=True))


def test_safety_rows_change_the_run(sets: RowSets, tokenizer: PreTrainedTokenizerFast, new_model: Model) -> None:
    plain = weights_after(new_model(), tokenizer, sft_recipe(sets, TRAIN))
    ours = weights_after(new_model(), tokenizer, mixed(sets, k=3))
    assert not all(torch.equal(one, two) for one, two in zip(plain, ours, strict=True))


def test_the_users_rows_come_first_and_untouched(sets: RowSets) -> None:
    found = mixed(sets, k=3).feeds["user"].rows
    assert tuple(found[:7]) == sets.user
    assert [sum(row in pool for row in found) for pool in (sets.safety, sets.borderline, sets.ordinary)] == [3, 3, 3]


def test_companions_are_counted_per_safety_row(sets: RowSets) -> None:
    plan = SafetyMix(SafetyMixConfig(k=4, borderline=0.5, ordinary=0.0)).plan(sets, TRAIN)
    assert (plan.user, plan.safety, plan.borderline, plan.ordinary) == (7, 4, 2, 0)
    assert plan.share == 4 / 11


def test_the_plan_says_how_often_the_rows_are_passed_over(sets: RowSets) -> None:
    assert SafetyMix(SafetyMixConfig(k=0)).plan(sets, TRAIN).epochs == pytest.approx(18 / 7)
    assert SafetyMix(SafetyMixConfig(k=3)).plan(sets, TRAIN).epochs == pytest.approx(18 / 16)
    assert SafetyMix(SafetyMixConfig(k=3, lambda_=1.0)).plan(sets, TRAIN).epochs == pytest.approx(18 / 7)


def test_the_plan_counts_how_differently_the_refusals_open(sets: RowSets) -> None:
    assert SafetyMix(SafetyMixConfig(k=6)).plan(sets, TRAIN).openings == 1


def test_the_plan_is_among_the_settings_of_the_run(sets: RowSets) -> None:
    told = mixed(sets, k=3).settings
    assert told["method"] == "safety_mix"
    assert told["mix"]["safety"] == 3


def test_a_pool_that_is_too_small_is_an_error(sets: RowSets) -> None:
    with pytest.raises(DataError, match=r"not enough 'safety' rows.\n  expected: at least 7"):
        mixed(sets, k=7, borderline=0.0, ordinary=0.0)
    with pytest.raises(DataError, match=r"not enough 'borderline' rows.\n  expected: at least 8"):
        mixed(sets, k=4, borderline=2.0)


def test_a_role_without_rows_is_named_by_its_flag_unless_it_is_not_wanted(sets: RowSets) -> None:
    few = RowSets(user=sets.user, safety=sets.safety)
    with pytest.raises(DataError, match="--borderline FILE"):
        mixed(few, k=3)
    assert len(mixed(few, k=3, borderline=0.0, ordinary=0.0).feeds["user"].rows) == 10


def test_k_and_share_together_are_an_error() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        SafetyMixConfig(k=3, share=0.1)


@pytest.mark.parametrize(
    "settings", [{"k": -1}, {"share": 1.0}, {"lambda_": -0.1}, {"safety_batch": 0}, {"borderline": -1.0}]
)
def test_settings_out_of_range_are_errors(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        SafetyMixConfig(**settings)  # type: ignore[arg-type]


def test_the_weighted_form_keeps_the_users_order_and_batch(sets: RowSets, tokenizer: PreTrainedTokenizerFast) -> None:
    recipe = mixed(sets, k=3, lambda_=0.5)
    assert list(recipe.feeds) == ["user", "safety"]
    assert tuple(recipe.feeds["user"].rows) == sets.user
    assert recipe.feeds["user"].batch_size is None
    assert recipe.feeds["safety"].batch_size == 4
    assert len(recipe.feeds["safety"].rows) == 9


def test_the_weight_follows_its_schedule(sets: RowSets, tokenizer: PreTrainedTokenizerFast, new_model: Model) -> None:
    found = {}
    for schedule in ("constant", "rising", "falling"):
        log = train(new_model(), tokenizer, mixed(sets, k=3, lambda_=0.5, schedule=schedule)).log
        found[schedule] = [figures["safety_weight"] for figures in log]
    assert found["constant"] == [0.5] * 6
    assert found["rising"] == pytest.approx([one / 12 for one in (1, 3, 5, 7, 9, 11)])
    assert found["falling"] == pytest.approx(found["rising"][::-1])


@pytest.mark.parametrize("schedule", ["constant", "rising", "falling"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_a_schedule_has_a_mean_of_one(schedule: str, steps: int) -> None:
    total = sum(ramp(schedule, step, steps) for step in range(steps))  # type: ignore[arg-type]
    assert total / steps == pytest.approx(1.0)


def test_a_schedule_alone_weighs_the_rows_by_their_tokens(
    sets: RowSets, tokenizer: PreTrainedTokenizerFast, new_model: Model
) -> None:
    recipe = mixed(sets, k=3, schedule="rising")
    log = train(new_model(), tokenizer, recipe).log
    model = new_model()
    tokens = {
        name: sum(row.answer_tokens for row in encode_rows(tokenizer, feed.rows, module=model))
        for name, feed in recipe.feeds.items()
    }
    mean = sum(figures["safety_weight"] for figures in log) / len(log)
    assert mean == pytest.approx(tokens["safety"] / tokens["user"])


def test_the_function_of_rows_gives_what_the_defence_trains_on(sets: RowSets) -> None:
    rows = mix(sets.user, sets.safety, sets.borderline, sets.ordinary, k=3, seed=0)
    assert rows == tuple(mixed(sets, k=3).feeds["user"].rows)
    assert mix(sets.user, sets.safety, k=3) == rows[:10]
    assert mix(sets.user, sets.safety, sets.borderline, sets.ordinary, k=0) == sets.user


def test_the_seed_of_the_run_draws_the_rows(sets: RowSets) -> None:
    first = mixed(sets, k=3).feeds["user"].rows
    other = mixed(sets, TrainConfig(steps=6, batch_size=3, seed=1), k=3).feeds["user"].rows
    assert first != other
    assert tuple(other) == mix(sets.user, sets.safety, sets.borderline, sets.ordinary, k=3, seed=1)


def test_conversations_keep_prompt_answer_and_system_apart() -> None:
    found = conversations([ChatRow("hello", "good day", system="you are pip")])
    assert found == [
        {
            "prompt": [{"role": "system", "content": "you are pip"}, {"role": "user", "content": "hello"}],
            "completion": [{"role": "assistant", "content": "good day"}],
        }
    ]


def test_a_reply_whose_beginning_is_given_is_no_conversation() -> None:
    with pytest.raises(DataError, match="1 of 1 rows with a 'prefill'"):
        conversations([ChatRow("hello", " day", prefill="good")])


def test_the_order_of_the_users_rows_is_that_of_plain_tuning(sets: RowSets, tokenizer: PreTrainedTokenizerFast) -> None:
    plain, ours = sft_recipe(sets, TRAIN), mixed(sets, k=3, lambda_=1.0)
    assert next(iter(ours.feeds)) == next(iter(plain.feeds)) == "user"


def test_it_is_asked_plainly_and_belongs_to_tuning() -> None:
    assert SafetyMix().stage == "tuning"
    assert SafetyMix().asking().ask("a", None) == ("a", None)
