# SPDX-License-Identifier: Apache-2.0
"""DELLA without election: the tests of its sheet."""

from __future__ import annotations

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.ops.task_vectors import keep_probabilities
from keelwright.repair.dare_linear import DareLinear, DareLinearConfig
from keelwright.repair.della_linear import DellaLinear, DellaLinearConfig, della_linear
from keelwright.weights.edit import model_roles
from keelwright.weights.stream import evaluate
from keelwright.weights.survey import with_survey


class Memory:
    """Named tensors as a source."""

    def __init__(self, tensors):
        self.tensors = tensors

    def entries(self):
        return {n: TensorEntry(n, STORED_NAMES[t.dtype], tuple(t.shape)) for n, t in self.tensors.items()}

    def read(self, name, start, stop):
        return self.tensors[name].reshape(-1)[start:stop].clone()

    def describe(self):
        return "memory"


def run(edit, *tensors, chunk=1 << 18):
    """Return what the engine makes of one tensor; the base comes first, then the tuned models in their order."""
    roles = ("aligned", *model_roles(len(tensors) - 1))
    sources = {role: Memory({"w": tensor}) for role, tensor in zip(roles, tensors, strict=True)}
    entry = sources["tuned"].entries()["w"]
    edit = with_survey(edit, sources, [entry])
    parts = [values for _, values in evaluate(edit, sources, entry, chunk_elements=chunk)]
    return torch.cat(parts).view(entry.shape)


def row(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_known_chances_of_the_sheet():
    chances = keep_probabilities(row(4, 1, 3, 2).view(1, 4), density=0.5, epsilon=0.15)
    assert chances.flatten().tolist() == pytest.approx([0.65, 0.35, 0.55, 0.45], abs=1e-12)


def test_every_row_has_the_density_as_its_mean_chance_and_a_row_of_one_has_it_itself():
    random = torch.Generator().manual_seed(1)
    chances = keep_probabilities(torch.randn(7, 11, generator=random), density=0.6, epsilon=0.3)
    assert torch.allclose(chances.mean(-1), torch.full((7,), 0.6, dtype=torch.float64), atol=1e-12)
    assert keep_probabilities(torch.ones(3, 1), density=0.6, epsilon=0.3).tolist() == [[0.6]] * 3


def test_kept_entries_are_divided_by_their_own_chance():
    tuned = row(4, 1, 3, 2)
    chances = row(0.65, 0.35, 0.55, 0.45)
    for seed in range(20):
        config = DellaLinearConfig(density=0.5, epsilon=0.15, seed=seed)
        merged = run(DellaLinear(config), torch.zeros(4), tuned)
        assert torch.allclose(merged, torch.where(merged != 0, tuned / chances, 0.0), atol=1e-5)
        assert torch.allclose(merged, della_linear(torch.zeros(4), [tuned], config, name="w"), atol=1e-6)


def test_large_entries_survive_more_often_as_their_chance_says():
    seeds, tuned = 2000, row(4, 1, 3, 2)
    chances = torch.tensor([0.65, 0.35, 0.55, 0.45], dtype=torch.float64)
    kept = torch.zeros(4, dtype=torch.float64)
    for seed in range(seeds):
        kept += run(DellaLinear(DellaLinearConfig(density=0.5, epsilon=0.15, seed=seed)), torch.zeros(4), tuned) != 0
    assert bool(((kept - seeds * chances).abs() <= 4 * (seeds * chances * (1 - chances)).sqrt()).all())


def test_without_reach_it_is_dare():
    random = torch.Generator().manual_seed(6)
    tensors = [torch.randn(5, 8, generator=random) for _ in range(3)]
    edit = DellaLinear(DellaLinearConfig(density=0.4, epsilon=0.0), 2)
    dare = DareLinear(DareLinearConfig(density=0.4, normalize=False), 2)
    assert torch.allclose(run(edit, *tensors), run(dare, *tensors), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4, 5), (30,), (9, 1), ()])
def test_rows_are_ranked_along_the_last_axis_whatever_the_chunks(shape):
    random = torch.Generator().manual_seed(8)
    base, tuned = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
    config = DellaLinearConfig(density=0.5, rescale="l1")
    whole = run(DellaLinear(config), base, tuned)
    assert torch.equal(run(DellaLinear(config), base, tuned, chunk=7), whole)
    assert torch.allclose(whole, della_linear(base, [tuned], config, name="w"), atol=1e-6)


def test_l1_keeps_the_sum_of_magnitudes():
    random = torch.Generator().manual_seed(3)
    tuned = torch.randn(40, 25, generator=random)
    merged = run(DellaLinear(DellaLinearConfig(density=0.3, rescale="l1")), torch.zeros(40, 25), tuned)
    assert merged.abs().sum().item() == pytest.approx(tuned.abs().sum().item(), rel=1e-5)


@pytest.mark.parametrize(("density", "epsilon"), [(0.15, 0.15), (0.85, 0.15), (0.5, 0.5), ((0.5, 0.9), 0.15)])
def test_chances_outside_a_probability_are_refused(density, epsilon):
    with pytest.raises(ConfigError, match="leave the range of a probability") as caught:
        DellaLinearConfig(density=density, epsilon=epsilon)
    assert "set 'epsilon' below" in str(caught.value)


def test_with_density_one_nothing_is_dropped_and_epsilon_has_no_effect():
    base, tuned = torch.zeros(3), [row(1, 2, 3), row(1, 0, 5)]
    assert DellaLinear(DellaLinearConfig(density=1.0)).copies("w") == "tuned"
    assert run(DellaLinear(DellaLinearConfig(density=1.0, normalize=False), 2), base, *tuned).tolist() == [2, 2, 8]
    assert (
        DellaLinear(DellaLinearConfig(density=1.0), 2).reach("w") is Reach.POINTWISE
        and DellaLinear().reach("w") is Reach.ROWS
    )
    mixed = run(DellaLinear(DellaLinearConfig(density=(1.0, 0.5), weight=(1.0, 0.0), normalize=False), 2), base, *tuned)
    assert mixed.tolist() == [1, 2, 3]
