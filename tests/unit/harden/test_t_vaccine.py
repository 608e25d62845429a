# SPDX-License-Identifier: Apache-2.0
"""T-Vaccine: which blocks are drawn, that only they change, and that a resumed run draws the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError, NumericalError
from keelwright.core.protocols import Silent
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.harden.t_vaccine import TVaccine, TVaccineConfig, TVaccineObjective, block_probabilities, draw_blocks
from keelwright.harden.vaccine import Vaccine, VaccineConfig
from keelwright.training.config import TrainConfig
from keelwright.training.loop import train
from keelwright.training.recipe import Recipe

Model = Callable[..., LlamaForCausalLM]
CONFIG = TrainConfig(steps=6, batch_size=4, lr=1e-2, checkpoint_every=2)
FEW = TVaccineConfig(blocks=1, draw_every=2, measure_every=3, harmful_batch=3)


@pytest.fixture
def sets(rows: list[ChatRow]) -> RowSets:
    refusals = tuple(ChatRow(row.prompt, "i will not help with that.") for row in rows)
    return RowSets(harmful=tuple(rows), safety=refusals, ordinary=tuple(rows[:2]))


def deep(new_model: Model, layers: int) -> LlamaForCausalLM:
    """Return a model of more blocks, the same each time."""
    config = new_model().config
    config.num_hidden_layers = layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def named(module: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in module.named_parameters()}


class StopAfter(Silent):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, count: int = 1) -> None:
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


def _objective(recipe: Recipe) -> TVaccineObjective:
    assert isinstance(recipe.objective, TVaccineObjective)
    return recipe.objective


def test_probabilities_are_shares_of_the_norms() -> None:
    assert block_probabilities(torch.tensor([1.0, 3.0, 4.0])).tolist() == pytest.approx([0.125, 0.375, 0.5])


def test_blocks_without_any_gradient_can_still_be_drawn() -> None:
    found = block_probabilities(torch.tensor([0.0, 2.0, 0.0]))
    assert float(found.sum()) == pytest.approx(1.0)
    assert draw_blocks(found, 3, source=torch.Generator().manual_seed(0)) == (0, 1, 2)
    assert block_probabilities(torch.zeros(4)).tolist() == [0.25] * 4


def test_norms_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericalError, match=r"harmful rows is not finite(?s:.)*1 of 2"):
        block_probabilities(torch.tensor([1.0, float("nan")]))


def test_blocks_are_drawn_with_their_probabilities_and_none_twice() -> None:
    source = torch.Generator().manual_seed(3)
    chances = torch.tensor([0.7, 0.2, 0.1, 0.0], dtype=torch.float64)
    ones = Counter(draw_blocks(chances, 1, source=source)[0] for _ in range(2000))
    assert [ones[block] / 2000 for block in range(4)] == pytest.approx([0.7, 0.2, 0.1, 0.0], abs=0.04)
    pairs = [draw_blocks(chances, 2, source=source) for _ in range(200)]
    assert all(len(set(pair)) == 2 and list(pair) == sorted(pair) for pair in pairs)


def test_only_the_drawn_blocks_change_in_a_step(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    model = deep(new_model, 4)
    recipe = TVaccine(replace(FEW, draw_every=1, blocks=2)).recipe(sets, replace(CONFIG, steps=5))
    before = named(deep(new_model, 4))
    drawn: list[tuple[int, ...]] = []

    def look(done: int, module: LlamaForCausalLM) -> None:
        nonlocal before
        after = named(module)
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        blocks = {int(name.split(".")[2]) for name in changed}
        assert all(name.startswith("model.layers.") for name in changed)
        assert blocks == set(_objective(recipe).drawn)
        assert len(changed) == len(blocks) * 9
        drawn.append(_objective(recipe).drawn)
        before = after

    train(model, tokenizer, recipe, after_step=look)
    assert len(drawn) == 5
    assert len(set(drawn)) > 1


def test_blocks_are_drawn_every_so_many_steps(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    recipe = TVaccine(replace(FEW, draw_every=3)).recipe(sets, replace(CONFIG, steps=9))
    seen: list[tuple[tuple[int, ...], list[float]]] = []

    def look(done: int, module: LlamaForCausalLM) -> None:
        objective = _objective(recipe)
        seen.append((objective.drawn, objective.probabilities.tolist()))

    train(deep(new_model, 6), tokenizer, recipe, after_step=look)
    for start in (0, 3, 6):
        assert seen[start] == seen[start + 1] == seen[start + 2]
    assert len({tuple(chances) for _, chances in seen}) == 3


def test_the_optimiser_keeps_the_moments_of_blocks_that_rest(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets, tmp_path: Path
) -> None:
    recipe = TVaccine(replace(FEW, draw_every=1)).recipe(sets, CONFIG)
    drawn: list[int] = []

    def look(done: int, module: LlamaForCausalLM) -> None:
        drawn.append(_objective(recipe).drawn[0])

    model = new_model()
    train(model, tokenizer, recipe, after_step=look, folder=tmp_path)
    assert set(drawn) == {0, 1}
    state = torch.load(tmp_path / "step-000006" / "optimizer.pt", weights_only=True)["state"]
    for index, name in enumerate(named(model)):
        if name.startswith("model.layers."):
            assert int(state[index]["step"]) == drawn.count(int(name.split(".")[2]))
            assert float(state[index]["exp_avg"].abs().max()) > 0.0
        else:
            assert index not in state


def test_a_model_with_fewer_blocks_is_vaccinated_in_all_of_them(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    ours, whole = new_model(), new_model()
    one = replace(CONFIG, steps=1)
    found = train(ours, tokenizer, TVaccine(replace(FEW, blocks=8)).recipe(sets, one))
    vaccine = train(whole, tokenizer, Vaccine(VaccineConfig(rho=FEW.rho)).recipe(sets, one))
    assert found.losses == vaccine.losses
    assert not torch.equal(ours.model.layers[0].mlp.up_proj.weight, new_model().model.layers[0].mlp.up_proj.weight)
    # Vaccine's step also holds the embedding, which counts in the norm that is clipped.
    assert torch.equal(ours.model.embed_tokens.weight, new_model().model.embed_tokens.weight)


@pytest.mark.parametrize("parts", [2, 3])
def test_a_step_in_parts_is_the_step(
    parts: int, tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    ends = []
    for accumulate in (1, parts):
        recipe = TVaccine(FEW).recipe(sets, replace(CONFIG, steps=1, accumulate=accumulate))
        log = train(new_model(), tokenizer, recipe).log[0]
        ends.append((log, _objective(recipe).probabilities.tolist(), _objective(recipe).drawn))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-3)
    assert ends[1][1] == pytest.approx(ends[0][1], rel=1e-4)
    assert ends[1][2] == ends[0][2]


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("stopped_after", [3, 5])
def test_an_interrupted_run_draws_the_same_blocks_and_ends_with_the_same_bits(
    stopped_after: int,
    lora_rank: int,
    tokenizer: PreTrainedTokenizerFast,
    new_model: Model,
    sets: RowSets,
    tmp_path: Path,
) -> None:
    # Checkpoints fall within a stretch of drawn blocks, and within one of measured probabilities.
    config = replace(CONFIG, lora_rank=lora_rank)
    method = TVaccine(replace(FEW, draw_every=3, measure_every=5))
    whole, resumed = deep(new_model, 4), deep(new_model, 4)
    expected = train(whole, tokenizer, method.recipe(sets, config))
    with pytest.raises(KeyboardInterrupt):
        train(
            deep(new_model, 4),
            tokenizer,
            method.recipe(sets, config),
            folder=tmp_path,
            progress=StopAfter(stopped_after),
        )
    result = train(resumed, tokenizer, method.recipe(sets, config), folder=tmp_path)
    assert result.log == expected.log
    first, second = named(whole), named(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_with_an_adapter_only_the_factors_of_the_drawn_blocks_change(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, sets: RowSets
) -> None:
    recipe = TVaccine(FEW).recipe(sets, replace(CONFIG, steps=1, lora_rank=2))
    result = train(new_model(), tokenizer, recipe)
    assert result.adapter is not None
    trained = {name for name, one in result.adapter.factors().items() if float(one.left.abs().max()) > 0.0}
    assert {int(name.split(".")[2]) for name in trained} == set(_objective(recipe).drawn)


def test_missing_rows_are_named(sets: RowSets) -> None:
    with pytest.raises(DataError, match=r"'t_vaccine' needs 'harmful' rows"):
        TVaccine().recipe(replace(sets, harmful=()), CONFIG)


@pytest.mark.parametrize(
    "setting", [{"rho": -1.0}, {"blocks": 0}, {"draw_every": 0}, {"measure_every": 0}, {"harmful_batch": 0}]
)
def test_a_setting_out_of_range_is_refused_by_name(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"'{next(iter(setting))}'"):
        TVaccineConfig(**setting)
