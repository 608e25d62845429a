# SPDX-License-Identifier: Apache-2.0
"""Multi-SLERP: the tests of its sheet, and its equation against the description in tangent space."""

from __future__ import annotations

import math

import pytest
import torch

from keelwright.core.errors import ConfigError, NumericalError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.multislerp import Multislerp, MultislerpConfig, multislerp
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
    ("weights", "wanted"), [((1.0, 1.0), (1.0606602, 1.0606602)), ((1.0, 3.0), (0.5533986, 1.6601958))]
)
def test_known_answers_of_the_sheet(weights, wanted):
    assert close(multislerp((ONE, TWO), weights), wanted)
    edit = Multislerp(MultislerpConfig(weights), models=2)
    assert close(run(edit, 1, tuned=ONE, tuned_2=TWO), wanted)


def test_with_a_base_the_mean_is_of_task_vectors():
    base = torch.tensor([5.0, -3.0])
    edit = Multislerp(MultislerpConfig((1.0, 3.0)), models=2, based=True)
    assert edit.roles() == ("aligned", "tuned_2", "tuned")
    assert close(run(edit, aligned=base, tuned=base + ONE, tuned_2=base + TWO), (5.5533986, -1.3398042))


def in_tangent_space(vectors, weights):
    """Follow the published description step by step: projections at the mean direction, their sum, the way back."""
    units = [one / one.norm() for one in vectors]
    mean = sum(weight * unit for weight, unit in zip(weights, units, strict=True))
    place = mean / mean.norm()
    tangent = sum(weight * (unit - (unit @ place) * place) for weight, unit in zip(weights, units, strict=True))
    length = tangent.norm()
    there = math.cos(length) * place + (math.sin(length) * tangent / length if length > 1e-12 else 0.0)
    return there * sum(weight * one.norm() for weight, one in zip(weights, vectors, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_the_equation_equals_the_description_in_tangent_space(seed):
    random = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(9, generator=random, dtype=torch.float64) for _ in range(4)]
    weights = torch.rand(4, generator=random, dtype=torch.float64)
    weights = (weights / weights.sum()).tolist()
    assert torch.allclose(multislerp(vectors, weights), in_tangent_space(vectors, weights), rtol=1e-9, atol=1e-12)


def test_two_opposite_directions_are_summed_linearly_and_reported():
    edit = Multislerp(models=2)
    assert close(run(edit, tuned=ONE, tuned_2=-3 * ONE), (-1.0, 0.0))
    assert facts(edit, tuned=ONE, tuned_2=-3 * ONE) == {"agreement": 0.0, "fell_back": 1.0}


def test_more_than_two_directions_that_cancel_are_an_error_naming_the_tensor():
    triangle = [
        torch.tensor([math.cos(a), math.sin(a)], dtype=torch.float64) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)
    ]
    with pytest.raises(NumericalError, match="no mean direction: tensor 'w'") as caught:
        run(Multislerp(models=3), tuned=triangle[0], tuned_2=triangle[1], tuned_3=triangle[2])
    assert caught.value.found == "directions that cancel"


def test_a_zero_tensor_adds_no_direction_and_no_length():
    assert close(multislerp((torch.zeros(2), TWO), (1.0, 1.0)), (0.0, 1.0))


def test_task_vectors_of_zero_give_the_base_to_the_bit():
    base = torch.tensor([0.1, 1 / 3, -1e-30])
    edit = Multislerp(models=3, based=True)
    assert torch.equal(run(edit, aligned=base, tuned=base, tuned_2=base, tuned_3=base), base)


def test_zero_tensors_without_a_base_give_zero():
    zero = torch.zeros(3)
    assert torch.equal(run(Multislerp(models=3), tuned=zero, tuned_2=zero, tuned_3=zero), zero)


def test_a_single_model_is_copied():
    edit = Multislerp(MultislerpConfig((3.0,)))
    assert edit.reach("w") is Reach.COPY and edit.copies("w") == "tuned"


def test_weights_that_sum_to_zero_cannot_be_normalised():
    with pytest.raises(ConfigError, match="sum to zero"):
        Multislerp(MultislerpConfig((1.0, -1.0)), models=2)
    plain = Multislerp(MultislerpConfig((1.0, -1.0), normalize_weights=False), models=2)
    # M = (1, -1), |M| = sqrt 2, sum w |x| = -1.
    assert close(run(plain, tuned=ONE, tuned_2=TWO), (-0.7071068, 0.7071068))


def test_a_weight_per_model_is_needed():
    with pytest.raises(ConfigError, match="'weight' does not fit") as caught:
        Multislerp(MultislerpConfig((1.0, 2.0)), models=3)
    assert caught.value.expected == "3 numbers, one per model in the order given, or a single one"


def test_the_eps_decides_where_there_is_no_direction():
    nearly = torch.tensor([-1.0, 1e-3])
    assert close(multislerp((ONE, nearly), (1.0, 1.0), eps=1e-2), (0.0, 5e-4))
    with pytest.raises(ConfigError, match="'eps' is out of range"):
        MultislerpConfig(eps=0.0)
