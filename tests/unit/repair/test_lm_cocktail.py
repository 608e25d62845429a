# SPDX-License-Identifier: Apache-2.0
"""LM-Cocktail: weights from losses, losses from a model."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean

import pytest
import torch

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.data.rows import ChatRow
from keelwright.models.chat import encode, render
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.ingredients import Ingredients
from keelwright.repair.lm_cocktail import LmCocktail, LmCocktailConfig, answer_losses, cocktail_weights, lm_cocktail
from keelwright.weights.live import LiveSource
from keelwright.weights.stream import evaluate


class Memory:
    """One tensor as a source."""

    def __init__(self, tensor):
        self.tensor = tensor

    def read(self, name, start, stop):
        return self.tensor.reshape(-1)[start:stop].clone()

    def describe(self):
        return "memory"


def run(edit, chunk_elements=2, **models):
    """Return the tensor that the engine makes."""
    layout = models[edit.roles()[-1]]
    entry = TensorEntry("w", STORED_NAMES[layout.dtype], tuple(layout.shape))
    sources = {role: Memory(tensor) for role, tensor in models.items()}
    parts = evaluate(edit, sources, entry, chunk_elements=chunk_elements)
    return torch.cat([values for _, values in parts]).view(layout.shape)


def close(found, wanted):
    return torch.allclose(found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("temperature", "wanted"), [(5.0, (0.42238, 0.34581, 0.23181)), (1.0, (0.70538, 0.25950, 0.03512))]
)
def test_known_weights_of_the_sheet(temperature, wanted):
    assert cocktail_weights((1.0, 2.0, 4.0), temperature=temperature) == pytest.approx(wanted, abs=5e-6)


def test_equal_losses_are_uniform_and_a_constant_changes_nothing():
    assert cocktail_weights((3.0,) * 4, temperature=5.0) == (0.25,) * 4
    shifted = cocktail_weights((101.0, 102.0, 104.0), temperature=5.0)
    assert shifted == pytest.approx(cocktail_weights((1.0, 2.0, 4.0), temperature=5.0), abs=1e-12)


def test_near_temperature_zero_the_best_model_is_copied():
    edit = LmCocktail(LmCocktailConfig(losses=(2.0, 1.0, 4.0), temperature=1e-4), models=2)
    assert edit.reach("w") is Reach.COPY and edit.copies("w") == "tuned"


def test_losses_follow_the_order_in_which_models_were_given():
    models = {
        "aligned": torch.tensor([1.0, 0, 0]),
        "tuned": torch.tensor([0, 1.0, 0]),
        "tuned_2": torch.tensor([0, 0, 1.0]),
    }
    edit = LmCocktail(LmCocktailConfig(losses=(1.0, 2.0, 4.0)), models=2)
    assert edit.roles() == ("aligned", "tuned_2", "tuned")
    found = run(edit, **models)
    assert found.tolist() == pytest.approx((0.42238, 0.34581, 0.23181), abs=5e-6)
    assert torch.allclose(found, lm_cocktail(list(models.values()), list(edit.combination().values())))


def test_fixed_weights_without_the_aligned_model():
    edit = LmCocktail(LmCocktailConfig(weight=(0.7, 0.3)), models=2, based=False)
    assert edit.combination() == {"tuned": 0.7, "tuned_2": 0.3}
    assert close(run(edit, tuned=torch.tensor([1.0, 0.0]), tuned_2=torch.tensor([0.0, 1.0])), (0.7, 0.3))


def test_without_weights_and_losses_the_error_says_what_is_needed():
    with pytest.raises(ConfigError, match="'lm_cocktail' has no weights") as caught:
        LmCocktail().combination()
    assert caught.value.fix == "give a file of examples, or set 'weight'"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"weight": (0.7, 0.4)}, "do not sum to 1"),
        ({"weight": (0.5, 0.5), "losses": (1.0, 2.0)}, "exclude each other"),
        ({"losses": (1.0, math.nan)}, "'losses' is out of range"),
        ({"temperature": 0.0}, "'temperature' is out of range"),
    ],
)
def test_settings_that_make_no_sense_are_errors(settings, text):
    with pytest.raises(ConfigError, match=text):
        LmCocktailConfig(**settings)


def test_a_loss_per_model_is_needed():
    with pytest.raises(ConfigError, match="'losses' does not fit the number of models"):
        LmCocktail(LmCocktailConfig(losses=(1.0, 2.0)), models=2)


ROWS = [ChatRow("a b", "c d e"), ChatRow("a", "b"), ChatRow("c c c c", "d e f g h")]


def test_losses_are_those_of_the_answer_alone_and_do_not_depend_on_the_batch(make_live):
    live = make_live(0)
    live.module.train()
    found = answer_losses(live.module, live.tokenizer, ROWS)
    assert live.module.training
    live.module.eval()
    for row, loss in zip(ROWS, found, strict=True):
        prompt = encode(live.tokenizer, render(live.tokenizer, row.prompt, None))
        answer = encode(live.tokenizer, row.answer)
        ids = torch.tensor([*prompt, *answer, live.tokenizer.eos_token_id])
        with torch.no_grad():
            logprobs = live.module(ids[None]).logits[0].log_softmax(-1)
        picked = [float(logprobs[at - 1, ids[at]]) for at in range(len(prompt), len(ids))]
        assert loss == pytest.approx(-sum(picked) / len(picked), abs=1e-5)
        assert answer_losses(live.module, live.tokenizer, [row])[0] == pytest.approx(loss, abs=1e-5)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_preparing_measures_every_model_on_the_examples_and_puts_the_live_one_back(make_live):
    aligned, tuned, other = make_live(0), make_live(1), make_live(2)
    before = snapshot(tuned.module)
    sources = {
        role: LiveSource(live.module) for role, live in (("aligned", aligned), ("tuned_2", other), ("tuned", tuned))
    }
    edit = LmCocktail(LmCocktailConfig(temperature=0.5), models=2)
    prepared = edit.prepare(Ingredients(tuned.module, tuned.tokenizer, sources, examples=ROWS))
    wanted = [fmean(answer_losses(live.module, live.tokenizer, ROWS)) for live in (aligned, tuned, other)]
    assert prepared.config.losses == tuple(wanted) and len(set(wanted)) == 3
    assert same(tuned.module, before)
    assert list(prepared.combination().values()) == list(cocktail_weights(wanted, temperature=0.5))


def test_a_prepared_edit_takes_another_temperature_without_measuring_again(make_live):
    aligned, tuned = make_live(0), make_live(1)
    sources = {"aligned": LiveSource(aligned.module), "tuned": LiveSource(tuned.module)}
    ingredients = Ingredients(tuned.module, tuned.tokenizer, sources, examples=ROWS)
    prepared = LmCocktail().prepare(ingredients)
    colder = replace(prepared, config=replace(prepared.config, temperature=0.1))
    assert colder.config.losses == prepared.config.losses
    assert colder.prepare(replace(ingredients, examples=())) is colder
    assert max(colder.combination().values()) > max(prepared.combination().values())


def test_without_examples_preparing_says_what_is_missing(make_live):
    live = make_live(0)
    with pytest.raises(DataError, match="learns from 'examples'"):
        LmCocktail().prepare(Ingredients(live.module, live.tokenizer, {"tuned": LiveSource(live.module)}))
