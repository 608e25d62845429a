# SPDX-License-Identifier: Apache-2.0
"""LoX: the tests of its sheet."""

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.lox import Lox, LoxConfig, low_rank_part, lox
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


ROLES = ("base", "aligned", "tuned")


def test_known_answer_of_a_diagonal_difference():
    aligned = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    base, tuned = torch.zeros(3, 3), torch.ones(3, 3)
    found = lox(base, aligned, tuned, coefficient=0.5, rank=2)
    assert torch.allclose(found, torch.ones(3, 3) + torch.diag(torch.tensor([2.0, 1.0, 0.0])), atol=1e-6)
    # 16 / 21 of the energy lies in the first direction.
    assert torch.allclose(low_rank_part(aligned, energy=0.7), torch.diag(torch.tensor([4.0, 0.0, 0.0])), atol=1e-6)


def test_no_strength_copies_the_target():
    assert Lox(LoxConfig(0.0)).reach("w") is Reach.COPY
    given = models(ROLES)
    assert torch.equal(run(Lox(LoxConfig(0.0)), **given)["layer.weight"], given["tuned"]["layer.weight"])


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("solver", ["exact", "sketch"])
def test_the_change_has_at_most_the_wanted_rank(shape, solver):
    given = models(ROLES, shape=shape)
    found = run(Lox(LoxConfig(1.0, rank=2, solver=solver)), **given)["layer.weight"]
    change = found.double() - given["tuned"]["layer.weight"].double()
    values = torch.linalg.svdvals(change)
    assert values[2] < 1e-6 * values[0] < values[1]


def test_every_rank_from_full_on_is_the_whole_difference():
    given = models(ROLES)
    plain = run(Lox(LoxConfig(1.0)), **given)["layer.weight"]
    for rank in (4, 9):
        assert torch.equal(run(Lox(LoxConfig(1.0, rank=rank)), **given)["layer.weight"], plain)
    expected = given["tuned"]["layer.weight"] + given["aligned"]["layer.weight"] - given["base"]["layer.weight"]
    assert torch.allclose(plain, expected, atol=1e-6)


def test_the_papers_target_is_the_aligned_model():
    given = models(ROLES)
    edit = Lox(LoxConfig(1.25, rank=1, target="aligned"))
    assert edit.roles() == ("base", "aligned")
    hardened = run(edit, base=given["base"], aligned=given["aligned"])
    same = run(Lox(LoxConfig(1.25, rank=1)), base=given["base"], aligned=given["aligned"], tuned=given["aligned"])
    assert all(torch.equal(hardened[name], same[name]) for name in hardened)
    assert torch.equal(hardened["norm"], given["aligned"]["norm"])


def test_a_sketch_without_a_rank_is_an_error():
    with pytest.raises(ConfigError, match="how many directions") as caught:
        LoxConfig(solver="sketch")
    assert caught.value.fix == "set 'rank', or use solver exact"
