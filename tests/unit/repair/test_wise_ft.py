# SPDX-License-Identifier: Apache-2.0
"""WiSE-FT: its known answer, its ends, and that it is linear interpolation."""

from __future__ import annotations

import math

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.repair.wise_ft import WiseFt, WiseFtConfig, wise_ft
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


ZERO_SHOT, FINE_TUNED = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 4.0])


def test_known_answer_of_the_sheet():
    assert close(wise_ft(ZERO_SHOT, FINE_TUNED, alpha=0.5), (0.5, 3.0))
    assert close(run(WiseFt(), 1, aligned=ZERO_SHOT, tuned=FINE_TUNED), (0.5, 3.0))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_it_has_the_bits_of_linear_interpolation(alpha):
    random = torch.Generator().manual_seed(0)
    pair = {role: torch.randn(30, generator=random).bfloat16() for role in ("aligned", "tuned")}
    assert torch.equal(run(WiseFt(WiseFtConfig(alpha)), **pair), run(Linear(LinearConfig(alpha)), **pair))
    assert WiseFt(WiseFtConfig(alpha)).combination() == Linear(LinearConfig(alpha)).combination()


@pytest.mark.parametrize(("alpha", "role"), [(0.0, "aligned"), (1.0, "tuned")])
def test_the_ends_copy(alpha, role):
    edit = WiseFt(WiseFtConfig(alpha))
    assert edit.reach("w") is Reach.COPY and edit.copies("w") == role


@pytest.mark.parametrize("alpha", [-0.01, 1.01, math.nan])
def test_alpha_outside_zero_to_one_is_an_error(alpha):
    with pytest.raises(ConfigError, match="'alpha' is out of range"):
        WiseFtConfig(alpha)
