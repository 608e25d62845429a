# SPDX-License-Identifier: Apache-2.0
"""SafeGrad: where it is plain tuning, what it cuts, and that it cuts once per step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.protocols import Silent
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.harden.safe_grad import SafeGrad, SafeGradConfig, SafeGradObjective
from keelwright.training.config import TrainConfig
from keelwright.training.defence import sft_recipe
from keelwright.training.loop import TrainResult, train

Model = Callable[..., LlamaForCausalLM]
CONFIG = TrainConfig(steps=6, batch_size=6, lr=1e-2)


@pytest.fixture
def sets(rows: list[ChatRow]) -> RowSets:
    """Rows that conflict: the same requests, answered by the user and refused."""
    return RowSets(
        user=tuple(rows),
        safety=tuple(replace(row, answer="no, i must decline.") for row in rows),
        ordinary=(ChatRow("please bake the bread.", "take the pan."),),
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
    return train(model, tokenizer, SafeGrad(SafeGradConfig(**settings)).recipe(sets, config))


def test_rho_zero_without_conflict_is_plain_tuning_bit_for_bit(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    plain, ours = new_model(), new_model()
    train(plain, tokenizer, sft_recipe(sets, CONFIG))
    # What the user learns is what alignment wants.
    result = tune(ours, tokenizer, replace(sets, safety=sets.user), rho=0.0, alignment="ce", alignment_batch=7)
    assert all(one["conflict"] == 0.0 for one in result.log)
    assert all(torch.equal(one, weights(ours)[name]) for name, one in weights(plain).items())


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_first_step_with_kl_is_that_of_plain_tuning(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, lora_rank: int
) -> None:
    plain, ours = new_model(), new_model()
    one = replace(CONFIG, steps=1, lora_rank=lora_rank)
    train(plain, tokenizer, sft_recipe(sets, one))
    log = tune(ours, tokenizer, sets, one, cache_mb=0).log
    assert log[0]["alignment"] == pytest.approx(0.0, abs=1e-9)
    assert log[0]["conflict"] == 0.0
    assert all(torch.equal(one, weights(ours)[name]) for name, one in weights(plain).items())


def test_kl_conflicts_as_soon_as_the_model_has_moved(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    log = tune(new_model(), tokenizer, sets).log
    assert log[1]["cosine"] < 0.0 and log[1]["conflict"] == 1.0
    shares = [sum(one["conflict"] for one in log[: step + 1]) / (step + 1) for step in range(len(log))]
    assert [one["conflict_share"] for one in log] == pytest.approx(shares)


def test_the_composed_gradient_is_the_cut_one_and_rho_times_the_other() -> None:
    user, alignment = [torch.tensor([1.0, 2.0])], [torch.tensor([0.0, -1.0])]
    for rho, expected in ((0.0, [1.0, 0.0]), (1.0, [1.0, -1.0])):
        objective = SafeGradObjective(config=SafeGradConfig(rho=rho))
        found = objective.combine(0, {"loss": user, "alignment": alignment})
        assert found[0].tolist() == expected
        assert objective.figures["conflict_share"] == 1.0
    assert user[0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("settings", [{}, {"alignment": "ce"}, {"direction": "reverse"}, {"rows": "alignment"}])
def test_refusals_stay_nearer_than_under_plain_tuning(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, settings: dict[str, str]
) -> None:
    losses = []
    for recipe in (sft_recipe(sets, CONFIG), SafeGrad(SafeGradConfig(**settings)).recipe(sets, CONFIG)):
        model = new_model()
        # Refusals must be there before they can be kept.
        train(model, tokenizer, list(sets.safety), replace(CONFIG, steps=60))
        train(model, tokenizer, recipe)
        losses.append(train(model, tokenizer, list(sets.safety), replace(CONFIG, steps=1, batch_size=7)).losses[0])
    assert losses[1] < 0.7 * losses[0]


def test_warm_up_uses_cross_entropy(tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets) -> None:
    log = tune(new_model(), tokenizer, sets, warmup_steps=2).log
    assert log[0]["alignment"] > 1.0 and log[1]["alignment"] > 1.0
    assert log[2]["alignment"] < 0.5


def test_scopes_are_different_methods(tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets) -> None:
    logs = [tune(new_model(), tokenizer, sets, scope=scope, alignment="ce").log for scope in ("global", "tensor")]
    assert {one["conflict"] for one in logs[0]} <= {0.0, 1.0}
    assert not {one["conflict"] for one in logs[1]} <= {0.0, 1.0}


@pytest.mark.parametrize("alignment", ["kl", "ce"])
def test_surgery_is_on_the_step_not_on_its_parts(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, alignment: str
) -> None:
    uneven = replace(sets, user=(*sets.user, ChatRow("please paint the lamp.", "no.")))
    logs = [
        tune(
            new_model(),
            tokenizer,
            uneven,
            replace(CONFIG, accumulate=parts, lr=1e-3),
            alignment=alignment,
            rho=0.5,
            cache_mb=0,
        ).log
        for parts in (1, 3)
    ]
    for one, two in zip(*logs, strict=True):
        assert one == pytest.approx(two, rel=5e-3, abs=1e-4)


class _StopAfter(Silent):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, count: int = 1) -> None:
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


def test_a_stopped_run_goes_on_with_its_count_of_conflicts(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, tmp_path: Path
) -> None:
    config = replace(CONFIG, checkpoint_every=2)
    whole, stopped = new_model(), new_model()
    expected = tune(whole, tokenizer, sets, config).log
    recipe = SafeGrad().recipe(sets, config)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, tokenizer, recipe, folder=tmp_path, progress=_StopAfter(5))
    again = new_model()
    found = train(again, tokenizer, SafeGrad().recipe(sets, config), folder=tmp_path).log
    assert [dict(one) for one in found] == [dict(one) for one in expected]
    assert all(torch.equal(one, weights(again)[name]) for name, one in weights(whole).items())


def test_missing_rows_and_senseless_settings_are_named(sets: RowSets) -> None:
    with pytest.raises(DataError, match="safe_grad"):
        SafeGrad().recipe(replace(sets, safety=()), CONFIG)
    for wrong in ({"rho": -1.0}, {"alignment": "dpo"}, {"scope": "layer"}, {"rows": "user"}, {"warmup_steps": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SafeGradConfig(**wrong)
