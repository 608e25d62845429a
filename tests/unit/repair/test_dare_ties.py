# SPDX-License-Identifier: Apache-2.0
"""DARE with a sign election: the tests of its sheets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.ops.philox import keep_randomly, stream_key
from keelwright.repair.dare_ties import DareTies, DareTiesConfig, dare_ties
from keelwright.repair.ties import Ties, TiesConfig
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


ZERO = torch.zeros(4)
DELTA = row(1, -2, 3, -4)


def mask_of(seed):
    return keep_randomly(torch.ones(4), probability=0.5, key=stream_key(seed, "tuned", "w"), offset=0).tolist()


def test_the_mask_of_the_sheet_rescales_by_the_density_or_to_the_sum_of_magnitudes():
    # The sheet's mask keeps the first two entries of four: take the first seed that draws it.
    seed = next(seed for seed in range(10_000) if mask_of(seed) == [1, 1, 0, 0])
    for rescale, expected in (
        ("inverse_keep", [2.0, -4.0, 0.0, 0.0]),
        ("l1", [10 / 3, -20 / 3, 0.0, 0.0]),
        ("none", [1.0, -2.0, 0.0, 0.0]),
    ):
        config = DareTiesConfig(density=0.5, rescale=rescale, seed=seed)
        for found in (run(DareTies(config), ZERO, DELTA), dare_ties(ZERO, [DELTA], config, name="w")):
            assert torch.allclose(found, torch.tensor(expected), atol=1e-6)


def test_the_mean_over_many_seeds_is_the_task_vector():
    seeds = 2000
    runs = torch.stack(
        [run(DareTies(DareTiesConfig(density=0.3, seed=seed)), ZERO, DELTA) for seed in range(seeds)]
    ).double()
    spread = DELTA.double().abs() * (0.7 / 0.3) ** 0.5 / seeds**0.5
    assert bool(((runs.mean(0) - DELTA.double()).abs() <= 3 * spread).all())


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_share_kept_is_the_density(density):
    kept = (
        run(DareTies(DareTiesConfig(density=density)), torch.zeros(40_000), torch.ones(40_000)).count_nonzero().item()
    )
    assert abs(kept - 40_000 * density) <= 4 * (40_000 * density * (1 - density)) ** 0.5


def test_the_sum_of_magnitudes_is_kept_by_l1_whatever_the_chunks():
    random = torch.Generator().manual_seed(2)
    base, tuned = torch.zeros(1000), torch.randn(1000, generator=random)
    config = DareTiesConfig(density=0.2, rescale="l1")
    merged = run(DareTies(config), base, tuned, chunk=77)
    assert merged.abs().sum().item() == pytest.approx(tuned.abs().sum().item(), rel=1e-5)
    assert merged.count_nonzero() < 300


def test_masks_differ_by_seed_by_model_and_by_tensor_and_nothing_else():
    base, ones = torch.zeros(64), torch.ones(64)

    def mask(name, **settings):
        return dare_ties(base, [ones], DareTiesConfig(density=0.5, **settings), name=name) != 0

    assert torch.equal(mask("w"), mask("w", coefficient=0.5))
    assert not torch.equal(mask("w"), mask("w", seed=1)) and not torch.equal(mask("w"), mask("v"))
    pair = run(DareTies(DareTiesConfig(density=0.5, weight=(1.0, 100.0), rescale="none"), 2), base, ones, ones)
    first, second = pair % 2 == 1, pair >= 100
    assert torch.equal(first, mask("w")) and not torch.equal(first, second)


def test_an_all_dropped_tensor_is_the_base():
    seed = next(s for s in range(1000) if not run(DareTies(DareTiesConfig(density=0.05, seed=s)), ZERO, DELTA).any())
    config = DareTiesConfig(density=0.05, seed=seed, rescale="l1")
    assert run(DareTies(config), row(1, 2, 3, 4), DELTA).tolist() == [1, 2, 3, 4]


def test_with_density_one_it_is_ties_without_normalize():
    random = torch.Generator().manual_seed(9)
    tensors = [torch.randn(6, 7, generator=random) for _ in range(4)]
    ours = DareTiesConfig(density=1.0, weight=(0.5, 1.0, -0.3), coefficient=0.8)
    other = Ties(TiesConfig(density=1.0, normalize=False, weight=ours.weight, coefficient=0.8), 3)
    for rescale in ("none", "inverse_keep", "l1"):
        edit = DareTies(replace(ours, rescale=rescale), 3)
        assert torch.equal(run(edit, *tensors), run(other, *tensors))


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="'seed' is out of range"):
        DareTiesConfig(seed=-1)
    with pytest.raises(ConfigError, match="'density' is out of range"):
        DareTiesConfig(density=0.0)
    assert DareTies().reach("w") is Reach.POINTWISE
    assert DareTies(DareTiesConfig(rescale="l1")).reach("w") is Reach.REDUCED
    assert DareTies(DareTiesConfig(density=1.0)).reach("w") is Reach.COPY


def test_entries_that_lose_the_election_are_left_out():
    base, tuned = torch.zeros(2), [row(5, 1), row(-1, 1), row(-1, -3)]
    for elect, expected in (("mass", [5, -3]), ("count", [-2, 2])):
        config = DareTiesConfig(density=1.0, elect=elect)
        assert run(DareTies(config, 3), base, *tuned).tolist() == expected
