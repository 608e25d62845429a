# SPDX-License-Identifier: Apache-2.0
"""SOMF: fusion by hand, identities of its sheet, gradients, exports, and learning that resumes to the bit."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.data.preferences import PreferenceRow
from keelwright.data.rows import ChatRow
from keelwright.models.adapters import AdaptedCheckpoint, LoraFactors
from keelwright.models.dtypes import STORED_NAMES
from keelwright.ops.concrete import concrete
from keelwright.ops.philox import uniforms
from keelwright.repair.ingredients import Ingredients
from keelwright.repair.mask_training import MaskLoop, Pairs, rate_at, split_pairs, temperature_at, waited
from keelwright.repair.somf import Somf, SomfConfig, _update, fuse, is_masked, somf
from keelwright.repair.somf_factors import read_factor_tasks
from keelwright.training.rows import EncodedRow
from keelwright.weights.live import LiveSource, LiveTrial
from keelwright.weights.masks import Mask
from keelwright.weights.stream import evaluate
from keelwright.weights.survey import with_survey
from keelwright.weights.virtual import VirtualModel


class Memory:
    """Tensors in memory as a source."""

    def __init__(self, tensors):
        self.tensors = tensors

    def entries(self):
        return {
            name: TensorEntry(name, STORED_NAMES[one.dtype], tuple(one.shape)) for name, one in self.tensors.items()
        }

    def read(self, name, start, stop):
        return self.tensors[name].reshape(-1)[start:stop].clone()

    def describe(self):
        return "memory"


def run(edit, chunk_elements=1 << 18, **models):
    """Return every tensor that the engine makes."""
    sources = {role: Memory(tensors) for role, tensors in models.items()}
    entries = sources[edit.roles()[-1]].entries()
    edit = with_survey(edit, sources, entries.values())
    return {
        name: torch.cat([values for _, values in evaluate(edit, sources, entry, chunk_elements=chunk_elements)]).view(
            entry.shape
        )
        for name, entry in entries.items()
    }


def models(roles, shape=(6, 4), seed=0):
    random = torch.Generator().manual_seed(seed)
    names = ("layer.weight", "other.weight")
    return {
        role: {
            **{name: torch.randn(shape, generator=random) for name in names},
            "norm": torch.randn(4, generator=random),
        }
        for role in roles
    }


ROLES = ("aligned", "tuned_2", "tuned")
PAIRS = [
    PreferenceRow(f"{one} {two}", chosen, rejected)
    for one in "abcd"
    for two in "efgh"
    for chosen, rejected in (("a b", "c d e"),)
]


def mask_of(given, value, tie="entry", size=2, seed=None):
    from keelwright.ops.concrete import logit_count

    random = torch.Generator().manual_seed(seed or 0)
    shapes = {name: tuple(one.shape) for name, one in given["tuned"].items()}
    logits = {}
    for name, shape in shapes.items():
        count = logit_count(shape, tie, size)
        logits[name] = torch.full((count,), value) if seed is None else torch.randn(count, generator=random)
    return Mask(logits, shapes, tie, size)


def plain(given, coefficient):
    return {
        name: base + coefficient * sum(given[role][name] - base for role in ("tuned", "tuned_2"))
        for name, base in given["aligned"].items()
    }


def test_known_answer_of_a_mask_by_hand():
    aligned, tuned = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([2.0, 0.0, 4.0, 1.0])
    mask = torch.tensor([1.0, 0.0, 0.5, 0.5])
    # The mean of the mask is one half: kept entries count double.
    assert somf(aligned, [tuned], mask).tolist() == [3.0, 1.0, 4.0, 1.0]
    assert somf(aligned, [tuned], mask, coefficient=0.5).tolist() == [2.0, 1.0, 2.5, 1.0]
    assert torch.equal(somf(aligned, [tuned], torch.ones(4)), tuned)
    assert torch.equal(somf(aligned, [tuned], torch.zeros(4)), aligned)


def test_known_answers_of_the_fusions():
    one, other = torch.tensor([1.0, -3.0, 2.0]), torch.tensor([3.0, 1.0, 0.0])
    assert fuse([one, other], None, fusion="task_arithmetic").tolist() == [4.0, -2.0, 2.0]
    assert fuse([one, other], None, fusion="average").tolist() == [2.0, -1.0, 1.0]
    assert fuse([one, other], None, fusion="ties").tolist() == [2.0, -3.0, 2.0]
    assert fuse([one], None, fusion="ties") is one


def test_a_mask_of_ones_is_plain_fusion_and_with_one_model_the_model():
    given = models(ROLES)
    found = run(Somf(SomfConfig(coefficient=0.3), models=2, mask=mask_of(given, 50.0)), **given)
    assert all(torch.allclose(found[name], one, atol=1e-6) for name, one in plain(given, 0.3).items())
    single = {role: given[role] for role in ("aligned", "tuned")}
    alone = run(Somf(mask=mask_of(given, 50.0)), **single)
    assert all(torch.allclose(alone[name], given["tuned"][name], atol=1e-6) for name in alone)


@pytest.mark.parametrize("export", ["mode", "sample", "mean"])
def test_an_empty_mask_returns_the_aligned_model(export):
    given = models(ROLES)
    edit = Somf(SomfConfig(export=export), models=2, mask=mask_of(given, -50.0))
    assert all(torch.equal(one, given["aligned"][name]) for name, one in run(edit, **given).items())


@pytest.mark.parametrize("tie", ["entry", "row", "column", "block", "head"])
@pytest.mark.parametrize("export", ["mode", "sample", "mean"])
@pytest.mark.parametrize("fusion", ["task_arithmetic", "average", "ties"])
def test_the_stream_equals_whole_tensors_for_every_tie_and_export(tie, export, fusion):
    given = models(ROLES, shape=(5, 7))
    mask = mask_of(given, 0.0, tie=tie, seed=4)
    edit = Somf(SomfConfig(coefficient=0.4, export=export, fusion=fusion, seed=2), models=2, mask=mask)
    found, parts = run(edit, **given), run(edit, chunk_elements=3, **given)
    for name, base in given["aligned"].items():
        whole = mask.values(name, 0, base.numel(), export=export, seed=2).view(base.shape)
        tuned = [given[role][name] for role in ("tuned", "tuned_2")]
        expected = somf(base, tuned, whole, coefficient=0.4, fusion=fusion)
        assert torch.allclose(found[name], expected, atol=1e-5)
        assert torch.equal(found[name], parts[name])


def test_the_mean_over_draws_is_the_vector_at_the_mean_mask():
    n, count = 64, 3000
    delta, logits = torch.randn(n, generator=torch.Generator().manual_seed(0)), torch.full((n,), 1.0)
    draws = [concrete(logits, uniforms((seed, 0), 0, n), temperature=0.5) for seed in range(count)]
    found = torch.stack([fuse([delta], m / m.mean(), fusion="average") for m in draws])
    error = found.std(dim=0) / count**0.5
    # The mean of the mask appears above and below: its share cancels, up to the spread of a mean of 64 draws.
    assert bool(((found.mean(dim=0) - delta).abs() <= 5 * error + 2e-3 * delta.abs()).all())


def test_tensors_without_a_mask_are_fused_as_they_are():
    given = models(ROLES)
    mask = mask_of(given, -50.0)
    part = Mask({"layer.weight": mask.logits["layer.weight"]}, {"layer.weight": mask.shapes["layer.weight"]})
    found = run(Somf(SomfConfig(coefficient=0.5), models=2, mask=part), **given)
    assert torch.equal(found["layer.weight"], given["aligned"]["layer.weight"])
    assert torch.allclose(found["other.weight"], plain(given, 0.5)["other.weight"], atol=1e-6)


def test_which_tensors_are_masked():
    assert is_masked("norm", (4,), "all") and not is_masked("norm", (4,), "matrices")
    assert is_masked("lm_head.weight", (4, 4), "matrices") and not is_masked("lm_head.weight", (4, 4), "inner")


def test_no_strength_copies_the_aligned_model_and_no_mask_is_an_error():
    edit = Somf(SomfConfig(coefficient=0.0))
    assert edit.reach("w") is Reach.COPY and edit.copies("w") == "aligned"
    with pytest.raises(ConfigError, match="SOMF has no mask yet"):
        run(Somf(), **{role: models(ROLES)[role] for role in ("aligned", "tuned")})
    assert Somf(models=3).roles() == ("aligned", "tuned_2", "tuned_3", "tuned")


# Factors


def factor_sources():
    random = torch.Generator().manual_seed(2)
    base = Memory({"w": torch.randn(3, 4, generator=random)})
    make = lambda: {"w": LoraFactors(torch.randn(3, 2, generator=random), torch.randn(2, 4, generator=random), 0.5)}  # noqa: E731
    return base, AdaptedCheckpoint(base, factors=make()), AdaptedCheckpoint(base, factors=make())


def test_the_space_of_factors_is_that_of_the_code_by_hand():
    base = Memory({"w": torch.zeros(2, 2)})
    eye = torch.eye(2)
    safe = AdaptedCheckpoint(base, factors={"w": LoraFactors(eye, eye, 2.0)})
    tuned = AdaptedCheckpoint(base, factors={"w": LoraFactors(eye + torch.ones(2, 2), 3.0 * eye, 2.0)})
    tasks = read_factor_tasks(safe, [tuned])
    left, right = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    mask = Mask({"w.left": left, "w.right": right}, tasks.shapes())
    sources = {"aligned": safe, "tuned": tuned}
    edit = Somf(SomfConfig(space="factors"), mask=mask, factors=tasks)
    entry = base.entries()["w"]
    found = torch.cat([values for _, values in evaluate(edit, sources, entry, chunk_elements=3)]).view(2, 2)
    # B = I + [[1, 1], [0, 0]] / 0.5, A = I + 2 I, W = 2 B A.
    assert found.tolist() == [[18.0, 12.0], [0.0, 6.0]]
    weights = somf(2.0 * eye, [6.0 * (eye + torch.ones(2, 2))], torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert not torch.allclose(found, weights)


def test_the_space_of_factors_starts_from_zero_where_the_aligned_model_has_no_adapter():
    base, _, tuned = factor_sources()
    tasks = read_factor_tasks(base, [tuned])
    assert not tasks.aligned["w"].left.any()
    full = tasks.fused("w", {}, 1.0, lambda vectors, gate: fuse(vectors, gate, fusion="average"))
    assert torch.equal(full.left, tuned.adapters[0].factors["w"].left)


def test_full_models_have_no_factors():
    base, safe, _ = factor_sources()
    with pytest.raises(ConfigError, match="space of factors needs plain LoRA adapters") as caught:
        read_factor_tasks(safe, [base])
    assert caught.value.fix == "use space: weights"


# Learning


class Double:
    """A model that stays in float64 throughout, and three sets of weights for it."""

    def __init__(self):
        def make(seed):
            torch.manual_seed(seed)
            return GPT2LMHeadModel(
                GPT2Config(vocab_size=12, n_positions=8, n_embd=4, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=1)
            ).double()

        self.module = make(3).eval()
        self.sources = [LiveSource(make(seed)).frozen() for seed in (0, 1, 2)]
        self.virtual = VirtualModel(self.module, self.sources[0], self.sources[1:])


def test_the_gradient_of_the_loss_is_that_of_finite_differences_with_frozen_draws():
    double = Double()
    shapes = {name: tuple(one.base.shape) for name, one in double.virtual.vectors.items()}

    class Words:
        pad_token_id = 0

    rows = Ingredients(double.module, Words(), {})
    settings = SomfConfig(coefficient=0.4).training()
    fused = lambda gates: _update(gates, 0.4, "task_arithmetic")  # noqa: E731
    loop = MaskLoop(double.virtual, shapes, fused, fused({}), settings, rows)
    encode = lambda ids: EncodedRow(torch.tensor(ids), 2)  # noqa: E731
    pairs = Pairs(
        [encode([1, 2, 3, 4]), encode([5, 6, 7])],
        [encode([1, 2, 8]), encode([5, 6, 9, 10, 11])],
        torch.tensor([[-3.0, -4.0], [-2.0, -5.0]], dtype=torch.float64),
    )
    random = torch.Generator().manual_seed(1)
    logits = {
        name: (0.3 * torch.randn(torch.Size(shape).numel(), generator=random, dtype=torch.float64)).requires_grad_()
        for name, shape in shapes.items()
    }
    loss = loop.loss(logits, 5, pairs, [0, 1])
    found = dict(zip(logits, torch.autograd.grad(loss, list(logits.values())), strict=True))
    assert all(one.grad is None for one in double.module.parameters())
    for name in ("transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.attn.c_proj.weight"):
        index = int(found[name].abs().argmax())
        values = []
        for sign in (1.0, -1.0):
            moved = {key: one.detach().clone() for key, one in logits.items()}
            moved[name][index] += sign * 1e-5
            values.append(float(loop.loss(moved, 5, pairs, [0, 1]).detach()))
        assert float(found[name][index]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6, abs=1e-9)


@pytest.fixture
def kitchen(make_live):
    """Return ingredients over tiny models, in the role order of two tuned models."""
    aligned, tuned, other = (LiveSource(make_live(seed, near=9).module).frozen() for seed in (0, 1, 2))
    live = make_live(5)
    sources = {"aligned": aligned, "tuned": tuned, "tuned_2": other}
    return Ingredients(live.module, live.tokenizer, sources, preferences=PAIRS)


SHORT = SomfConfig(steps=6, batch_size=4, lr=0.1, check_every=2, coefficient=0.5, held_out_share=0.25)


def test_learning_lowers_the_loss_and_leaves_the_module_alone(kitchen):
    before = {name: one.detach().clone() for name, one in kitchen.module.named_parameters()}
    seen = []
    watched = replace(kitchen, check=lambda module: seen.append(module) or {"over_refusal": 0.25})
    edit = Somf(replace(SHORT, steps=40), models=2).prepare(watched)
    losses = edit.mask.recipe["checks"]
    assert losses[-1]["held_out_loss"] < losses[0]["held_out_loss"]
    assert losses[0]["over_refusal"] == 0.25 and seen[0] is kitchen.module
    for name, one in kitchen.module.named_parameters():
        assert torch.equal(one, before[name]) and one.grad is None


def test_the_edit_writes_the_model_that_was_measured_while_learning(kitchen):
    seen = []
    ids = torch.tensor([[4, 5, 6]])

    def look(module):
        with torch.no_grad():
            seen.append(module(input_ids=ids).logits)
        return {}

    edit = Somf(SHORT, models=2).prepare(replace(kitchen, check=look))
    kitchen.module.load_state_dict(
        {
            name: kitchen.sources["tuned"].read(name, 0, entry.elements).view(entry.shape)
            for name, entry in kitchen.sources["tuned"].entries().items()
        }
    )
    with LiveTrial(kitchen.module, kitchen.sources) as live, torch.no_grad():
        live.apply(edit)
        assert torch.allclose(kitchen.module(input_ids=ids).logits, seen[-1], atol=1e-5)
        assert not torch.allclose(seen[0], seen[-1], atol=1e-3)


def test_the_same_seed_learns_the_same_mask_and_another_seed_another(kitchen):
    one, again = (Somf(SHORT, models=2).prepare(kitchen).mask for _ in range(2))
    other = Somf(replace(SHORT, seed=1), models=2).prepare(kitchen).mask
    assert one.digest() == again.digest() != other.digest()


def test_a_run_that_was_killed_ends_with_the_same_bits(kitchen, tmp_path):
    whole = Somf(SHORT, models=2).prepare(replace(kitchen, folder=tmp_path / "whole")).mask
    place = replace(kitchen, folder=tmp_path / "killed")

    class Killed(Exception):
        pass

    calls = []

    def kill(module):
        calls.append(module)
        if len(calls) == 2:
            raise Killed
        return {}

    with pytest.raises(Killed):
        Somf(SHORT, models=2).prepare(replace(place, check=kill))
    resumed = Somf(SHORT, models=2).prepare(place).mask
    assert resumed.digest() == whole.digest()
    assert resumed.recipe["checks"] == whole.recipe["checks"]


def test_a_prepared_edit_takes_another_coefficient_without_learning_again(kitchen):
    edit = Somf(SHORT, models=2).prepare(kitchen)
    other = replace(edit, config=replace(edit.config, coefficient=0.2))
    assert other.mask is edit.mask and repr(edit) != repr(other)
    assert edit.mask.digest() in repr(edit)


@pytest.mark.parametrize(
    "setting",
    [
        {"tie": "row"},
        {"tie": "block"},
        {"straight_through": True},
        {"fusion": "ties"},
        {"reference": "fused"},
        {"masked": "inner"},
        {"final_temperature": 0.1},
    ],
)
def test_every_option_learns(kitchen, setting):
    mask = Somf(replace(SHORT, **setting), models=2).prepare(kitchen).mask
    assert any(bool(one.any()) for one in mask.logits.values())
    assert ("model.norm.weight" in mask.logits) == (setting != {"masked": "inner"})


def test_the_space_of_factors_learns(kitchen):
    random = torch.Generator().manual_seed(0)
    name = "model.layers.0.self_attn.q_proj.weight"

    def adapter():
        factors = LoraFactors(torch.randn(16, 2, generator=random), torch.randn(2, 16, generator=random), 0.1)
        return AdaptedCheckpoint(kitchen.sources["aligned"], factors={name: factors})

    sources = {"aligned": kitchen.sources["aligned"], "tuned": adapter(), "tuned_2": adapter()}
    edit = Somf(replace(SHORT, space="factors"), models=2).prepare(replace(kitchen, sources=sources))
    assert set(edit.mask.logits) == {f"{name}.left", f"{name}.right"}
    assert edit.reach(name) is Reach.POINTWISE and edit.reach("model.norm.weight") is Reach.COPY


def test_ordinary_examples_enter_the_loss(kitchen):
    config = replace(SHORT, sft_weight=1.0)
    with pytest.raises(DataError, match="learns from 'examples'"):
        Somf(config, models=2).prepare(kitchen)
    with_rows = replace(kitchen, examples=[ChatRow("a b", "h g"), ChatRow("c d", "h h")])
    mask = Somf(config, models=2).prepare(with_rows).mask
    assert mask.digest() != Somf(SHORT, models=2).prepare(kitchen).mask.digest()


def test_without_pairs_there_is_nothing_to_learn_from(kitchen):
    with pytest.raises(DataError, match="learns from 'preferences'"):
        Somf(SHORT, models=2).prepare(replace(kitchen, preferences=()))


def test_a_prompt_is_never_learned_from_and_held_out():
    rows = PAIRS + [replace(row, chosen="b b") for row in PAIRS]
    training, held_out = split_pairs(rows, 0.25, 0)
    assert len(held_out) == len(rows) / 4 and not {one.prompt for one in training} & {one.prompt for one in held_out}
    assert split_pairs(rows, 0.0, 0)[1] == []
    with pytest.raises(DataError, match="no preference pairs to learn from"):
        split_pairs(PAIRS[:1], 0.9, 0)


def test_rates_and_temperatures_by_hand():
    settings = SomfConfig(steps=10, lr=1.0, warmup_steps=2, temperature=1.0, final_temperature=0.1).training()
    assert [rate_at(settings, step) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert rate_at(settings, 6) == pytest.approx(0.5) and rate_at(settings, 10) == pytest.approx(0.0)
    assert temperature_at(settings, 0) == 1.0 and temperature_at(settings, 9) == pytest.approx(0.1)


def test_patience_counts_measurements_without_a_lower_loss():
    assert waited([]) == 0
    assert waited([{"held_out_loss": x} for x in (0.5, 0.4, 0.6, 0.4)]) == 2


def test_learning_stops_when_the_held_out_loss_no_longer_falls(kitchen):
    config = replace(SHORT, steps=400, check_every=1, patience=2, lr=30.0)
    mask = Somf(config, models=2).prepare(kitchen).mask
    assert mask.recipe["steps"] < 400 and waited(mask.recipe["checks"]) == 2


def test_wrong_settings_are_errors():
    for wrong in ({"tie": "rows"}, {"lr": 0.0}, {"held_out_share": 1.0}, {"steps": 0}, {"export": "soft"}):
        with pytest.raises(ConfigError):
            SomfConfig(**wrong)
