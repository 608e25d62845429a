# SPDX-License-Identifier: Apache-2.0
"""Safe Delta: the rule, the compensation against closed forms and a slow twin, and the measured inputs."""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from keelwright.core.errors import ConfigError, DataError, NumericalError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.data.rows import ChatRow
from keelwright.models.dtypes import STORED_NAMES
from keelwright.ops.second_order import inverse_factor, place_entries
from keelwright.repair.ingredients import Ingredients
from keelwright.repair.safe_delta import LayerInputs, SafeDelta, SafeDeltaConfig, kept_entries, safe_delta
from keelwright.weights.live import LiveSource
from keelwright.weights.stream import evaluate
from keelwright.weights.survey import with_survey


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
        role: {**{name: torch.randn(shape, generator=random) for name in names}, "norm": torch.ones(4)}
        for role in roles
    }


ROLES = ("aligned", "tuned")

# Block size, budget and the matrix.
KNOWN = (
    (
        3,
        2000.0,
        [
            [1.25, 1.75, -0.5, 0.5, 0.125, 1.0],
            [-0.5, -0.875, 1.25, 2.25, 0.0, -0.499769],
            [0.625, 0.5, -0.75, 0.875, -1.75, 0.084403],
        ],
    ),
    (
        2048,
        1500.0,
        [
            [1.25, 1.75, -0.5, 0.5, -0.217594, 1.281894],
            [-0.5, -0.875, 1.25, 2.0, 0.17131, -0.499769],
            [0.625, 0.5, -0.75, 1.0, -1.903078, 0.084403],
        ],
    ),
)


def problem(rows=5, columns=6, seed=0):
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, columns, generator=random) * torch.linspace(0.5, 2.0, columns)
    aligned = torch.randn(rows, columns, generator=random)
    return aligned, aligned + 0.1 * torch.randn(rows, columns, generator=random), 2.0 / 10 * inputs.T @ inputs


def slow(aligned, tuned, hessian, config):
    """Return what the rule says, one column after the other; groups and blocks as the settings have them."""
    rows, columns = aligned.shape
    damped = hessian.double() + config.damping * hessian.double().diagonal().mean() * torch.eye(
        columns, dtype=torch.float64
    )
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, wanted = aligned.double().clone(), tuned.double()
    for start in range(0, columns, config.block_size):
        block = range(start, min(start + config.block_size, columns))
        price = {m: 1.0 / float(factor[m, m]) ** 2 for m in block}
        entries = [(m, i) for m in sorted(block, key=price.get) for i in range(rows)]
        entries = entries[: len(entries) - int(config.reserve * len(entries))]
        limit = sum(price.values()) / len(block) * config.budget / config.budget_divisor * rows / config.budget_rows
        kept, spent = set(), 0.0
        for m, i in entries:
            spent += float(wanted[i, m] - left[i, m]) ** 2 * price[m]
            if spent <= limit:
                kept.add((i, m))
        for first in range(start, block.stop, config.group):
            group = range(first, min(first + config.group, block.stop))
            moves = []
            for m in group:
                for i in range(rows):
                    if (i, m) in kept:
                        moves.append((i, m, float(left[i, m] - wanted[i, m]) / float(factor[m, m])))
                        left[i, m] = wanted[i, m]
            for i, m, error in moves:
                left[i, group.stop :] -= error * factor[m, group.stop :]
    return left


def test_the_compensation_of_one_fixed_column_is_the_closed_form():
    aligned, tuned, hessian = (one.double() for one in problem(rows=1))
    factor = inverse_factor(hessian, damping=1e-12)
    chosen = torch.zeros(1, 6, dtype=torch.bool)
    chosen[0, 0] = True
    done, _ = place_entries(aligned, tuned, chosen, factor, group=1)
    moved = tuned[0, 0] - aligned[0, 0]
    expected = aligned[0, 1:] - torch.linalg.solve(hessian[1:, 1:], hessian[1:, 0]) * moved
    assert done[0, 0] == tuned[0, 0] and torch.allclose(done[0, 1:], expected, atol=1e-9)


def test_the_factor_is_that_of_the_damped_inverse_and_dead_inputs_count_as_one():
    hessian = problem()[2]
    hessian = (hessian + hessian.T) / 2
    factor = inverse_factor(hessian, damping=0.01)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(6, dtype=torch.float64)
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(6, dtype=torch.float64), atol=1e-9)
    dead = torch.diag(torch.tensor([4.0, 0.0]))
    assert inverse_factor(dead, damping=0.0).diagonal().tolist() == [0.5, 1.0]


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("block_size", [1, 4, 64])
@pytest.mark.parametrize("budget", [30.0, 120.0])
def test_the_matrix_is_that_of_the_slow_twin(group, block_size, budget):
    aligned, tuned, hessian = problem()
    config = SafeDeltaConfig(budget=budget, block_size=block_size, group=group)
    found = safe_delta(aligned, tuned, hessian, config)
    assert torch.allclose(found.double(), slow(aligned, tuned, hessian, config), atol=1e-5)
    assert not torch.equal(found, aligned) and (block_size == 1 or not torch.equal(found, tuned))


def test_nothing_kept_is_the_aligned_matrix_and_everything_kept_the_tuned_one():
    aligned, tuned, hessian = problem()
    for config in (SafeDeltaConfig(budget=0.0), SafeDeltaConfig(coefficient=0.0), SafeDeltaConfig(1.0, reserve=1.0)):
        assert torch.equal(safe_delta(aligned, tuned, hessian, config), aligned)
    assert torch.equal(safe_delta(aligned, tuned, hessian, SafeDeltaConfig(1.0, reserve=0.0)), tuned)
    assert torch.equal(safe_delta(aligned, tuned, hessian, SafeDeltaConfig(budget=1e9, reserve=0.0)), tuned)


def test_the_reserve_takes_the_columns_that_cost_most():
    aligned, tuned, _ = problem(rows=10, columns=4)
    kept = kept_entries(aligned, tuned, torch.tensor([1.0, 0.1, 0.5, 2.0]), SafeDeltaConfig(1.0, reserve=0.3))
    # 12 of 40 entries: the ten of the second column, and the last two of the third.
    assert kept.sum(dim=0).tolist() == [10, 0, 8, 10]


def test_a_larger_budget_keeps_more():
    aligned, tuned, _ = problem()
    counts = [
        int(kept_entries(aligned, tuned, torch.linspace(0.5, 1.0, 6), SafeDeltaConfig(budget=budget)).sum())
        for budget in (0.0, 10.0, 100.0, 1e6)
    ]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == 30 - int(0.15 * 30)


def test_compensation_lowers_what_the_kept_entries_cost_on_the_inputs():
    aligned, tuned, hessian = problem(rows=8)
    config = SafeDeltaConfig(coefficient=0.4, reserve=0.0, group=1)
    kept = safe_delta(aligned, tuned, hessian, config)
    # Compensation moves what is not tuned.
    without = torch.where(kept == tuned, tuned, aligned)

    def cost(one):
        error = (one - aligned).double()
        return float((error @ hessian.double() * error).sum())

    assert 0.0 < cost(kept) < cost(without)


@pytest.fixture
def kitchen(make_live):
    """Return ingredients over tiny models."""
    aligned, tuned, live = (make_live(seed, near=9) for seed in (0, 1, 2))
    sources = {"aligned": LiveSource(aligned.module).frozen(), "tuned": LiveSource(tuned.module).frozen()}
    rows = [ChatRow("a b", "c d e"), ChatRow("f", "g"), ChatRow("h a b", "c")]
    return aligned.module, Ingredients(live.module, live.tokenizer, sources, safety_rows=rows)


def test_inputs_are_those_of_the_aligned_model_without_padding(kitchen):
    aligned, ingredients = kitchen
    found = SafeDelta().prepare(ingredients).inputs
    alone = SafeDelta(SafeDeltaConfig(batch_size=1)).prepare(ingredients).inputs
    name = "model.layers.1.mlp.down_proj.weight"
    seen = []
    handle = aligned.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, x, y: seen.append(x[0][0]))
    from keelwright.training.rows import encode_rows

    with torch.no_grad():
        for row in encode_rows(ingredients.tokenizer, ingredients.safety_rows, module=aligned):
            aligned(input_ids=row.ids[None])
    handle.remove()
    inputs = torch.cat(seen)
    expected = 2.0 / 3 * inputs.T @ inputs
    assert torch.allclose(alone.hessians[name], expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(found.hessians[name], expected, rtol=1e-3, atol=1e-5)
    assert found.rows == 3 and "lm_head.weight" not in found.hessians and len(found.hessians) == 14


def test_the_module_is_left_as_it_was(kitchen):
    _, ingredients = kitchen
    before = {name: one.detach().clone() for name, one in ingredients.module.named_parameters()}
    SafeDelta().prepare(ingredients)
    assert all(torch.equal(one, before[name]) for name, one in ingredients.module.named_parameters())
    assert not any(layer._forward_hooks for layer in ingredients.module.modules())


@pytest.mark.parametrize("rest", ["aligned", "tuned"])
def test_the_edit_does_what_the_function_does_and_copies_the_rest(kitchen, rest):
    _, ingredients = kitchen
    edit = SafeDelta(SafeDeltaConfig(coefficient=0.5, rest=rest)).prepare(ingredients)
    name, other = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"
    assert edit.reach(name) is Reach.MATRIX and edit.reach(other) is Reach.COPY and edit.copies(other) == rest
    entry = ingredients.sources["tuned"].entries()[name]
    found = torch.cat([values for _, values in evaluate(edit, ingredients.sources, entry)]).view(entry.shape)
    whole = {
        role: source.read(name, 0, entry.elements).view(entry.shape) for role, source in ingredients.sources.items()
    }
    assert torch.equal(found, safe_delta(whole["aligned"], whole["tuned"], edit.inputs.hessians[name], edit.config))
    again = replace(edit, config=replace(edit.config, coefficient=0.2))
    assert again.inputs is edit.inputs and repr(again) != repr(edit)


def test_layers_that_store_inputs_by_outputs_are_turned():
    def make(seed):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=12, n_positions=8, n_embd=4, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=1)
        return GPT2LMHeadModel(config).eval()

    from keelwright.models.names import name_map
    from keelwright.repair.safe_delta import layer_inputs
    from keelwright.training.rows import EncodedRow

    module = make(0)
    sources = {"aligned": LiveSource(make(0)).frozen(), "tuned": LiveSource(make(1)).frozen()}
    rows = [EncodedRow(torch.tensor([1, 2, 3, 4]), 2)]
    names = name_map(module, sources["aligned"])
    inputs = layer_inputs(module, names, rows, batch_size=2, pad_id=0)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert name in inputs.transposed and inputs.hessians[name].shape == (4, 4)
    entry = sources["tuned"].entries()[name]
    assert entry.shape == (4, 16)
    edit = SafeDelta(SafeDeltaConfig(coefficient=0.5), inputs)
    found = torch.cat([values for _, values in evaluate(edit, sources, entry)]).view(entry.shape)
    pair = [sources[role].read(name, 0, entry.elements).view(entry.shape).T for role in ROLES]
    assert torch.equal(found, safe_delta(*pair, inputs.hessians[name], edit.config).T)


def test_without_rows_or_preparation_there_are_errors_that_help(kitchen):
    _, ingredients = kitchen
    with pytest.raises(DataError, match="learns from 'safety_rows'"):
        SafeDelta().prepare(replace(ingredients, safety_rows=()))
    with pytest.raises(ConfigError, match="has not measured the layers' inputs"):
        SafeDelta().reach("w")


def test_inputs_that_cannot_be_inverted_are_named():
    given = models(ROLES, shape=(2, 2))
    inputs = LayerInputs({"layer.weight": torch.tensor([[1.0, 3.0], [3.0, 1.0]])}, frozenset(), 1)
    with pytest.raises(NumericalError, match=r"inputs of 'layer\.weight' cannot be inverted"):
        run(SafeDelta(SafeDeltaConfig(0.5), inputs), **given)


def test_wrong_settings_are_errors():
    for wrong in ({"coefficient": 1.1}, {"budget": -1.0}, {"damping": 0.0}, {"group": 0}, {"rest": "base"}):
        with pytest.raises(ConfigError):
            SafeDeltaConfig(**wrong)


def test_known_answers_of_the_official_code():
    # From ColinLu50/SafeDelta at 3a4ea35 with a stable sort, on the CPU: one batch of these seven inputs.
    aligned = torch.tensor([[1, 2, -1, 0.5, 0, 1.5], [0, -1, 1, 2, 0.25, -0.5], [0.5, 0.5, -0.5, 1, -2, 0]])
    moves = [[2, -2, 4, 0, 1, -4], [-4, 1, 2, 2, -2, 4], [1, 4, -2, -1, 2, 2]]
    tuned = aligned + torch.tensor(moves) / 8.0
    inputs = torch.tensor(
        [
            [1.0, 0.0, 2.0, -1.0, 1.0, 0.0],
            [0.0, 1.0, 1.0, 1.0, 0.0, 2.0],
            [2.0, 1.0, 0.0, 0.0, -1.0, 1.0],
            [1.0, -1.0, 1.0, 0.0, 2.0, 1.0],
            [0.0, 2.0, -1.0, 1.0, 1.0, 0.0],
            [1.0, 1.0, 1.0, -2.0, 0.0, 1.0],
            [-1.0, 0.0, 1.0, 1.0, 1.0, 1.0],
        ]
    )
    for block_size, budget, expected in KNOWN:
        config = SafeDeltaConfig(budget=budget, block_size=block_size)
        found = safe_delta(aligned, tuned, 2.0 * inputs.T @ inputs, config)
        assert torch.allclose(found, torch.tensor(expected), atol=1e-6)
