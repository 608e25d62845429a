# SPDX-License-Identifier: Apache-2.0
"""NearSwap: the tests of its sheet."""

from __future__ import annotations

import math

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.nearswap import Nearswap, NearswapConfig, nearswap
from keelwright.weights.stream import evaluate


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


ALIGNED, TUNED = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.5, 1.05, 2.0, 2.0])


def test_known_answer_of_the_sheet():
    assert close(nearswap(ALIGNED, TUNED, t=0.1), (0.1, 1.05, 2.0, 2.9))
    assert close(run(Nearswap(NearswapConfig(0.1)), aligned=ALIGNED, tuned=TUNED), (0.1, 1.05, 2.0, 2.9))


def test_it_equals_the_published_form_from_a_step_of_1e_6_on():
    random = torch.Generator().manual_seed(0)
    base = torch.randn(500, generator=random, dtype=torch.float64)
    other = base + 1e-3 * torch.randn(500, generator=random, dtype=torch.float64)
    for t in (1e-6, 1e-4, 1e-3, 1.0):
        share = (t / (other - base).abs().clamp_min(1e-6)).clamp(0, 1)
        assert torch.allclose(nearswap(base, other, t=t), share * other + (1 - share) * base, rtol=0, atol=1e-15)


def test_weights_within_the_bound_are_the_tuned_ones_to_the_bit():
    aligned, tuned = torch.tensor([1.0, 1.0]), torch.tensor([1.1, 1 / 3])
    found = nearswap(aligned, tuned, t=0.2)
    assert found[0] == tuned[0] and found[1] == torch.tensor(0.8)


@pytest.mark.parametrize(("t", "role"), [(0.0, "aligned"), (math.inf, "tuned")])
def test_no_bound_and_no_change_copy(t, role):
    edit = Nearswap(NearswapConfig(t))
    assert edit.reach("w") is Reach.COPY and edit.copies("w") == role
    assert nearswap(ALIGNED, TUNED, t=t) is (ALIGNED if role == "aligned" else TUNED)


@pytest.mark.parametrize("t", [-1e-9, math.nan])
def test_a_negative_bound_is_an_error(t):
    with pytest.raises(ConfigError, match="'t' is out of range"):
        NearswapConfig(t)


def test_the_search_goes_over_the_bound():
    space = Nearswap.search_space
    assert space.setting == "t" and all(NearswapConfig(**{space.setting: one}) for one in space.grid)
    assert torch.equal(nearswap(ALIGNED, TUNED, t=space.neutral), TUNED)
