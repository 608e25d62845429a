# SPDX-License-Identifier: Apache-2.0
"""Passthrough: a copy, or a multiple."""

from __future__ import annotations

import math

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.passthrough import Passthrough, PassthroughConfig, passthrough
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


TUNED = torch.tensor([0.1, -2.0, 1 / 3])


@pytest.mark.parametrize("scale", [None, 1.0])
def test_without_a_scale_the_bytes_are_copied(scale):
    edit = Passthrough(PassthroughConfig(scale))
    assert edit.reach("w") is Reach.COPY and edit.copies("w") == "tuned" and edit.roles() == ("tuned",)
    assert torch.equal(run(edit, tuned=TUNED), TUNED)
    assert edit.combination() == {"tuned": 1.0}


def test_a_scale_multiplies_every_weight():
    assert close(run(Passthrough(PassthroughConfig(-0.5)), tuned=TUNED), (-0.05, 1.0, -1 / 6))
    assert torch.equal(passthrough(TUNED, scale=2.0), 2.0 * TUNED)
    assert passthrough(TUNED, scale=None) is TUNED


def test_it_takes_exactly_one_model():
    with pytest.raises(ConfigError, match="'passthrough' does not take 2 tuned models"):
        Passthrough(models=2)


@pytest.mark.parametrize("scale", [math.inf, math.nan])
def test_a_scale_that_is_no_number_is_an_error(scale):
    with pytest.raises(ConfigError, match="'scale' is out of range"):
        PassthroughConfig(scale)
