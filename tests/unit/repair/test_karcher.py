# SPDX-License-Identifier: Apache-2.0
"""Karcher mean: the tests of its sheet, and the iteration on vectors as its oracle."""

from __future__ import annotations

import math

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.ops.gram import gram
from keelwright.repair.karcher import Karcher, KarcherConfig, karcher, karcher_mean
from keelwright.weights.stream import evaluate, reduce_tensor


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


def facts(edit, **models):
    """Return what the edit reports of the tensor."""
    layout = models[edit.roles()[-1]]
    entry = TensorEntry("w", STORED_NAMES[layout.dtype], tuple(layout.shape))
    return edit.facts(reduce_tensor(edit, {role: Memory(tensor) for role, tensor in models.items()}, entry))


ONE, TWO = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])


@pytest.mark.parametrize(
    ("weights", "wanted", "steps"),
    [((1.0, 1.0), (1.0606602, 1.0606602), 0), ((1.0, 3.0), (0.6696963, 1.6167890), 1)],
)
def test_known_answers_of_the_sheet(weights, wanted, steps):
    # 1.75 at 67.5 degrees for weights 1 to 3.
    assert close(karcher((ONE, TWO), weights), wanted)
    edit = Karcher(KarcherConfig(weights), models=2)
    assert close(run(edit, 1, tuned=ONE, tuned_2=TWO), wanted)
    assert facts(edit, tuned=ONE, tuned_2=TWO) == {"steps": steps, "fell_back": 0.0, "unsettled": 0.0}


def test_known_answer_of_three_axes():
    axes = torch.eye(3)
    edit = Karcher(models=3)
    wanted = (3**-0.5,) * 3
    assert close(karcher(list(axes), (1.0, 1.0, 1.0)), wanted)
    assert close(run(edit, tuned=axes[0], tuned_2=axes[1], tuned_3=axes[2]), wanted)


def on_vectors(vectors, weights, steps=200):
    """Iterate on the vectors themselves, to the end."""
    shares = [weight / sum(weights) for weight in weights]
    units = [one / one.norm() for one in vectors]
    mean = sum(share * unit for share, unit in zip(shares, units, strict=True))
    mean = mean / mean.norm()
    for _ in range(steps):
        move = torch.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            angle = torch.acos((mean @ unit).clamp(-1, 1))
            if angle > 1e-12:
                move += share * angle / torch.sin(angle) * (unit - torch.cos(angle) * mean)
        length = move.norm()
        if length < 1e-14:
            break
        mean = torch.cos(length) * mean + torch.sin(length) * move / length
        mean = mean / mean.norm()
    return mean * sum(share * one.norm() for share, one in zip(shares, vectors, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_the_iteration_on_dot_products_ends_where_the_one_on_vectors_does(seed):
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(8, generator=random, dtype=torch.float64)
    vectors = [common + 0.7 * torch.randn(8, generator=random, dtype=torch.float64) for _ in range(4)]
    weights = (0.1 + torch.rand(4, generator=random, dtype=torch.float64)).tolist()
    found = karcher(vectors, weights, max_iter=200, tol=1e-7)
    assert torch.allclose(found, on_vectors(vectors, weights), rtol=1e-6, atol=1e-6)


def test_the_mean_has_the_least_sum_of_squared_angles_nearby():
    random = torch.Generator().manual_seed(3)
    vectors = [torch.randn(6, generator=random, dtype=torch.float64) + 1.0 for _ in range(3)]
    units = torch.stack([one / one.norm() for one in vectors])
    mean = karcher(vectors, (1.0, 1.0, 1.0), max_iter=100)
    cost = lambda place: float(torch.acos((units @ (place / place.norm())).clamp(-1, 1)).square().sum())  # noqa: E731
    for _ in range(50):
        assert cost(mean) <= cost(mean + 0.02 * torch.randn(6, generator=random, dtype=torch.float64))


def test_two_models_meet_on_the_arc_with_linearly_mixed_norms():
    angle = 0.25 * math.pi / 2
    wanted = tuple((0.75 * 1.0 + 0.25 * 2.0) * one for one in (math.cos(angle), math.sin(angle)))
    assert close(karcher((ONE, TWO), (3.0, 1.0)), wanted)


def test_opposite_directions_are_averaged_linearly_in_any_order_and_reported():
    edit = Karcher(models=2)
    assert close(run(edit, tuned=ONE, tuned_2=-3 * ONE), (-1.0, 0.0))
    assert torch.equal(run(edit, tuned=-3 * ONE, tuned_2=ONE), run(edit, tuned=ONE, tuned_2=-3 * ONE))
    assert facts(edit, tuned=ONE, tuned_2=-3 * ONE)["fell_back"] == 1.0


def test_three_directions_that_cancel_have_no_unique_mean():
    triangle = [
        torch.tensor([math.cos(a), math.sin(a)], dtype=torch.float64) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)
    ]
    assert not karcher_mean(gram(triangle), (1 / 3,) * 3).is_unique
    assert float(karcher(triangle, (1.0,) * 3).norm()) < 1e-12


def test_short_tensors_have_a_direction_like_others():
    scale = 1e-7
    assert close(karcher((scale * ONE, scale * TWO), (1.0, 3.0)) / scale, (0.6696963, 1.6167890))


def test_a_zero_tensor_adds_no_direction_but_counts_for_the_norm():
    assert close(karcher((torch.zeros(2), TWO), (1.0, 1.0)), (0.0, 1.0))
    assert torch.equal(karcher((torch.zeros(2), torch.zeros(2)), (1.0, 1.0)), torch.zeros(2))


def test_too_few_steps_are_reported():
    vectors = {"tuned": ONE, "tuned_2": torch.tensor([-0.9, 0.5]), "tuned_3": torch.tensor([0.1, -0.2])}
    edit = Karcher(KarcherConfig((1.0, 2.0, 0.7), max_iter=1, tol=1e-9), models=3)
    said = facts(edit, **vectors)
    assert said["unsettled"] == 1.0 and said["steps"] == 1.0


def test_equal_models_come_out_to_the_bit():
    model = torch.tensor([0.1, 1 / 3, -1e-30, 7.0])
    edit = Karcher(KarcherConfig((1.0, 2.0, 0.5)), models=3)
    assert torch.equal(run(edit, tuned=model, tuned_2=model, tuned_3=model), model)


@pytest.mark.parametrize(("weights", "models", "role"), [(1.0, 1, "tuned"), ((0.0, 2.0), 2, "tuned_2")])
def test_a_model_with_all_the_weight_is_copied(weights, models, role):
    edit = Karcher(KarcherConfig(weights), models=models)
    assert edit.reach("w") is Reach.COPY and edit.copies("w") == role


def test_negative_weights_and_a_sum_of_zero_are_errors():
    with pytest.raises(ConfigError, match="'weight' is out of range"):
        KarcherConfig((1.0, -1.0))
    with pytest.raises(ConfigError, match="sum to zero"):
        Karcher(KarcherConfig((0.0, 0.0)), models=2)
