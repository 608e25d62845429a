# SPDX-License-Identifier: Apache-2.0
"""RESTA_d: the identities of its sheet, by hand and through the engine."""

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.ops.philox import stream_key, uniforms
from keelwright.repair.resta import Resta, RestaConfig
from keelwright.repair.resta_d import RestaD, RestaDConfig, resta_d
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


ROLES = ("aligned", "unaligned", "tuned")
KEY = (1, 2)


def test_known_answer_with_a_mask_of_a_half():
    aligned, unaligned = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 5.0, 4.5])
    tuned = torch.tensor([1.5, 2.0, 3.0, 3.0])
    kept = uniforms(KEY, 0, 4) < 0.5
    assert kept.any() and not kept.all()
    found = resta_d(aligned, unaligned, tuned, coefficient=0.5, drop_rate=0.5, key=KEY)
    thin = [2.0 * (t - a) if k else 0.0 for a, t, k in zip(aligned.tolist(), tuned.tolist(), kept, strict=True)]
    expected = [a + d + 0.5 * (a - u) for a, d, u in zip(aligned.tolist(), thin, unaligned.tolist(), strict=True)]
    assert found.tolist() == expected
    safety = [2.0 * (a - u) if k else 0.0 for a, u, k in zip(aligned.tolist(), unaligned.tolist(), kept, strict=True)]
    found = resta_d(aligned, unaligned, tuned, coefficient=0.5, drop_rate=0.5, dare_on="safety", key=KEY)
    assert found.tolist() == [t + 0.5 * s for t, s in zip(tuned.tolist(), safety, strict=True)]


def test_without_dropping_it_is_resta_to_the_bit():
    given = models(ROLES)
    plain = run(Resta(RestaConfig(0.7)), **given)
    for dare_on in ("task", "safety"):
        found = run(RestaD(RestaDConfig(0.7, drop_rate=0.0, dare_on=dare_on)), **given)
        assert all(torch.equal(plain[name], found[name]) for name in plain)


@pytest.mark.parametrize("dare_on", ["task", "safety"])
def test_the_mean_over_seeds_is_resta(dare_on):
    given = models(ROLES)
    plain = run(Resta(RestaConfig(0.5)), **given)["layer.weight"]
    found = torch.stack(
        [run(RestaD(RestaDConfig(0.5, 0.3, dare_on, seed)), **given)["layer.weight"] for seed in range(800)]
    )
    error = found.std(dim=0) / 800**0.5
    assert bool(((found.mean(dim=0) - plain).abs() <= 5.0 * error + 1e-6).all())
    assert bool((error > 0.0).any())


@pytest.mark.parametrize("dare_on", ["task", "safety"])
def test_masks_depend_on_neither_chunks_nor_the_order_of_tensors(dare_on):
    given = models(ROLES, shape=(7, 4))
    edit = RestaD(RestaDConfig(0.5, 0.5, dare_on))
    whole = run(edit, **given)
    turned = {role: dict(reversed(tensors.items())) for role, tensors in given.items()}
    for other in (run(edit, chunk_elements=5, **given), run(edit, **turned)):
        assert all(torch.equal(whole[name], other[name]) for name in whole)
    masks = [(run(edit, **given)[name] == given["tuned"][name]) for name in ("layer.weight", "other.weight")]
    assert dare_on == "task" or not torch.equal(*masks)


def test_the_drop_rate_is_the_share_of_entries_dropped():
    n = 20_000
    zero, one = torch.zeros(n), torch.ones(n)
    found = resta_d(zero, zero, one, coefficient=0.0, drop_rate=0.8, key=stream_key(0, "w"))
    assert sorted(set(found.tolist())) == [0.0, pytest.approx(5.0)]
    assert float((found > 0).float().mean()) == pytest.approx(0.2, abs=0.015)


def test_what_cannot_change_is_copied():
    assert RestaD(RestaDConfig(0.0, 0.0)).reach("w") is Reach.COPY
    assert RestaD(RestaDConfig(0.0, 0.5, "safety")).reach("w") is Reach.COPY
    assert RestaD(RestaDConfig(0.0, 0.5)).reach("w") is Reach.POINTWISE
    given = models(ROLES)
    assert torch.equal(run(RestaD(RestaDConfig(0.0, 0.0)), **given)["layer.weight"], given["tuned"]["layer.weight"])


def test_a_drop_rate_of_one_is_an_error():
    with pytest.raises(ConfigError, match="'drop_rate' is out of range"):
        RestaDConfig(drop_rate=1.0)
    with pytest.raises(ConfigError, match="'dare_on' is not a known choice") as caught:
        RestaDConfig(dare_on="tsk")
    assert caught.value.fix == "did you mean 'task'?"
