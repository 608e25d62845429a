# SPDX-License-Identifier: Apache-2.0
"""SLERP: the tests of its sheets."""

from __future__ import annotations

import math

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.ops.gram import gram
from keelwright.repair.slerp import Slerp, SlerpConfig, angle_between, slerp, slerp_weights
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


KNOWN = [
    ((1.0, 0.0), (0.0, 2.0), 0.5, (0.7071068, 1.4142136)),
    ((1.0, 0.0), (0.5, math.sqrt(3) / 2), 0.25, (0.9659258, 0.2588190)),
]


@pytest.mark.parametrize(("aligned", "tuned", "t", "wanted"), KNOWN)
def test_known_answers_of_the_sheet(aligned, tuned, t, wanted):
    aligned, tuned = torch.tensor(aligned), torch.tensor(tuned)
    assert close(slerp(aligned, tuned, coefficient=t), wanted)
    assert close(run(Slerp(SlerpConfig(t)), 1, aligned=aligned, tuned=tuned), wanted)


def test_a_zero_tensor_is_interpolated_linearly():
    zero, other = torch.zeros(2), torch.tensor([0.0, 2.0])
    assert close(slerp(zero, other, coefficient=0.25), (0.0, 0.5))
    assert facts(Slerp(), aligned=zero, tuned=other)["fell_back"] == 1.0


def test_opposite_tensors_are_interpolated_linearly():
    one = torch.tensor([1.0, 2.0])
    assert close(slerp(one, -one, coefficient=0.25), (0.5, 1.0))


@pytest.mark.parametrize(("degrees", "fell_back"), [(1.7, 1.0), (1.9, 0.0), (178.2, 1.0), (178.0, 0.0)])
def test_the_chord_is_taken_from_a_cosine_of_0_9995(degrees, fell_back):
    angle = math.radians(degrees)
    aligned, tuned = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(angle), math.sin(angle)])
    said = facts(Slerp(), aligned=aligned, tuned=tuned)
    assert said["fell_back"] == fell_back
    assert said["cosine"] == pytest.approx(math.cos(angle), abs=1e-6)


def test_the_linear_fallback_loses_no_more_than_the_sheet_says():
    # The chord's middle at the threshold angle is shorter than the arc's by 1 - cos(W / 2).
    angle = math.acos(0.9995) * 0.9999
    pair = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([math.cos(angle), math.sin(angle)])
    middle = slerp(pair[0], pair[1].double(), coefficient=0.5)
    assert 1.2e-4 < 1.0 - float(middle.norm()) < 1.3e-4


def test_the_coefficient_is_not_clamped():
    aligned, tuned = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert close(slerp(aligned, tuned, coefficient=2.0), (-1.0, 0.0))


@pytest.mark.parametrize(("coefficient", "role"), [(0.0, "aligned"), (1.0, "tuned")])
def test_the_ends_copy(coefficient, role):
    edit = Slerp(SlerpConfig(coefficient))
    assert edit.reach("w") is Reach.COPY and edit.copies("w") == role
    assert edit.shares() is None


def test_all_coefficients_share_one_reduction():
    assert Slerp(SlerpConfig(0.2)).shares() == Slerp(SlerpConfig(0.8)).shares() != None  # noqa: E711


def test_a_model_interpolated_with_itself_stays_to_the_bit():
    model = torch.tensor([0.1, 1 / 3, -1e-30, 7.0])
    assert torch.equal(run(Slerp(SlerpConfig(0.3)), aligned=model, tuned=model.clone()), model)


def test_the_angle_is_that_of_the_whole_tensor_and_not_of_a_chunk():
    random = torch.Generator().manual_seed(0)
    aligned, tuned = torch.randn(5, 7, generator=random), torch.randn(5, 7, generator=random)
    weights = slerp_weights(angle_between(gram((aligned, tuned))), 0.3)
    wanted = weights[0] * aligned.double() + weights[1] * tuned.double()
    for chunk in (1, 3, 100):
        found = run(Slerp(SlerpConfig(0.3)), chunk, aligned=aligned, tuned=tuned)
        assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_16_bit_weights_are_evaluated_in_float32_and_rounded_once():
    random = torch.Generator().manual_seed(1)
    aligned, tuned = (torch.randn(40, generator=random).bfloat16() for _ in range(2))
    wide = slerp(aligned.float(), tuned.float(), coefficient=0.4)
    assert torch.equal(slerp(aligned, tuned, coefficient=0.4), wide.bfloat16())


@pytest.mark.parametrize("coefficient", [float("nan"), float("inf"), -float("inf")])
def test_a_coefficient_that_is_no_number_is_an_error(coefficient):
    with pytest.raises(ConfigError, match="'coefficient' is out of range"):
        SlerpConfig(coefficient)


def test_an_empty_tensor_has_no_angle_and_stays_empty():
    entry = TensorEntry("w", "F32", (0, 3))
    nothing = Memory(torch.zeros(0, 3))
    assert list(evaluate(Slerp(), {"aligned": nothing, "tuned": nothing}, entry)) == []
    assert reduce_tensor(Slerp(), {"aligned": nothing, "tuned": nothing}, entry)["angle"].has_arc is False
