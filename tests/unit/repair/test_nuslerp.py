# SPDX-License-Identifier: Apache-2.0
"""NuSLERP: the tests of its sheet."""

from __future__ import annotations

import math

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.nuslerp import Nuslerp, NuslerpConfig, nuslerp, place
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


ONE, TWO = torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
KNOWN = [
    ({"flatten": False}, ((0.7071068, 0.7071068), (0.0, 1.5))),
    ({"flatten": False, "row_wise": True}, ((0.5, 0.5137432), (0.0, 1.5412295))),
    ({}, ((0.5534320, 0.5534320), (0.0, 1.6602960))),
]


@pytest.mark.parametrize(("settings", "wanted"), KNOWN)
@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_known_answers_of_the_sheet_by_vectors_and_flat(settings, wanted, chunk):
    assert close(nuslerp((ONE, TWO), (1.0, 1.0), **settings), wanted)
    assert close(run(Nuslerp(NuslerpConfig(1.0, **settings)), chunk, tuned=ONE, tuned_2=TWO), wanted)


def test_known_answer_with_a_base():
    base = torch.tensor([1.0, 1.0])
    one, two = base + torch.tensor([1.0, 0.0]), base + torch.tensor([0.0, 1.0])
    assert close(nuslerp((one, two), (1.0, 2.0), base=base), (1.5, 1.8660254))
    edit = Nuslerp(NuslerpConfig((1.0, 2.0)), based=True)
    assert edit.roles() == ("aligned", "tuned_2", "tuned")
    assert close(run(edit, aligned=base, tuned=one, tuned_2=two), (1.5, 1.8660254))


def oracle(models, weights, base, flatten, row_wise):
    """Interpolate vector by vector in double precision."""
    t = place(weights)
    origin = torch.zeros_like(models[0]) if base is None else base
    p, q = (one.double() - origin.double() for one in models)
    shape = p.shape
    if flatten or p.ndim < 2:
        p, q = p.reshape(1, -1), q.reshape(1, -1)
    elif row_wise:
        p, q = p.reshape(shape[0], -1).T, q.reshape(shape[0], -1).T
    else:
        p, q = p.reshape(-1, shape[-1]), q.reshape(-1, shape[-1])
    rows = []
    for one, two in zip(p, q, strict=True):
        angle = torch.acos((one @ two / one.norm() / two.norm()).clamp(-1, 1))
        rows.append((torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * two) / torch.sin(angle))
    out = torch.stack(rows)
    out = out.T if not flatten and row_wise and len(shape) > 1 else out
    return out.reshape(shape) + origin.double()


@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 4, 2), (4, 1, 3, 2)])
@pytest.mark.parametrize("settings", [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("based", [False, True])
def test_every_axis_agrees_with_one_vector_at_a_time(shape, settings, based):
    flatten, row_wise = settings
    random = torch.Generator().manual_seed(len(shape))
    one, two, base = (torch.randn(shape, generator=random) for _ in range(3))
    wanted = oracle((one, two), (1.0, 2.5), base if based else None, flatten, row_wise)
    edit = Nuslerp(NuslerpConfig((1.0, 2.5), flatten, row_wise), based=based)
    given = {"tuned": one, "tuned_2": two, **({"aligned": base} if based else {})}
    for chunk in (1, 5, 100):
        assert torch.allclose(run(edit, chunk, **given).double(), wanted, rtol=1e-5, atol=1e-5)


def test_opposite_vectors_are_linear_and_counted():
    one = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    two = torch.tensor([[-3.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    for row_wise in (False, True):
        edit = Nuslerp(NuslerpConfig(1.0, flatten=False, row_wise=row_wise))
        given = {"tuned": one.T.contiguous() if row_wise else one, "tuned_2": two.T.contiguous() if row_wise else two}
        found = run(edit, **given)
        wanted = ((-1.0, 0.0), (0.7071068, 0.7071068), (1.0, 0.0))
        assert close(found.T if row_wise else found, wanted)
        assert facts(edit, **given) == {"vectors": 3.0, "fell_back": 2.0, "opposite": 1.0}


def test_a_small_angle_still_has_an_arc():
    # Where slerp would take the chord, whose middle has the norm cos(0.005): 1.2e-5 less.
    one, two = (torch.tensor([math.cos(a), math.sin(a)], dtype=torch.float64) for a in (0.0, 0.01))
    found = nuslerp((one, two), (1.0, 1.0))
    assert float(found.norm()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("weights", "role"), [((1.0, 0.0), "tuned"), ((0.0, 4.0), "tuned_2")])
def test_the_ends_of_the_arc_copy(weights, role):
    edit = Nuslerp(NuslerpConfig(weights))
    assert edit.reach("w") is Reach.COPY and edit.copies("w") == role and edit.passes("w") == 0


def test_weights_that_cancel_meet_in_the_middle():
    assert place((1.0, -1.0)) == 0.5
    assert place((1.0, 3.0)) == 0.75


@pytest.mark.parametrize("settings", [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("based", [False, True])
def test_equal_models_come_out_to_the_bit(settings, based):
    random = torch.Generator().manual_seed(0)
    model, base = torch.randn(4, 5, generator=random), torch.randn(4, 5, generator=random)
    edit = Nuslerp(NuslerpConfig((1.0, 2.0), *settings), based=based)
    given = {"tuned": model, "tuned_2": model.clone(), **({"aligned": base} if based else {})}
    assert torch.equal(run(edit, **given), model)


def test_it_takes_exactly_two_models():
    with pytest.raises(ConfigError, match="'nuslerp' does not take 3 tuned models") as caught:
        Nuslerp(models=3)
    assert caught.value.expected == "exactly 2, beside the aligned one where it reads that"
    with pytest.raises(ConfigError, match="'weight' does not fit"):
        Nuslerp(NuslerpConfig((1.0, 2.0, 3.0)))


@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("shape", [(3, 100_003), (70_001, 5)])
def test_vectors_that_lie_across_two_blocks_of_a_large_tensor_have_one_arc(row_wise, shape):
    random = torch.Generator().manual_seed(5)
    one, two = (torch.randn(shape, generator=random) for _ in range(2))
    edit = Nuslerp(NuslerpConfig((1.0, 2.5), flatten=False, row_wise=row_wise))
    found = run(edit, 1 << 18, tuned=one, tuned_2=two)
    wanted = nuslerp((one, two), (1.0, 2.5), flatten=False, row_wise=row_wise)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert facts(edit, tuned=one, tuned_2=two)["vectors"] == (shape[1] if row_wise else shape[0])
