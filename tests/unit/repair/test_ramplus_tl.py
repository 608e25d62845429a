# SPDX-License-Identifier: Apache-2.0
"""RAM+: the tests of its sheet."""

from __future__ import annotations

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.ramplus_tl import RamplusTl, RamplusTlConfig, factor, ramplus_tl
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
FIRST, SECOND = row(1, 0, 2, 0), row(3, 0, 0, 4)


def test_known_answer_of_the_sheet():
    config = RamplusTlConfig(epsilon=0.01)
    expected = pytest.approx([2, 0, 2.04, 4.08], abs=1e-6)
    assert ramplus_tl(ZERO, [FIRST, SECOND], config).tolist() == expected
    assert run(RamplusTl(config), ZERO, FIRST, SECOND, chunk=1).tolist() == expected


@pytest.mark.parametrize(
    ("unique", "shared", "expected"), [(10, 1, 1.01), (1, 1, 1.02), (0, 3, 1.02), (0, 0, 1.0), (5, 0, 1.0)]
)
def test_factors_grow_with_the_shared_entries_up_to_alpha(unique, shared, expected):
    assert factor(unique, shared, RamplusTlConfig()) == pytest.approx(expected)


def test_the_model_scope_counts_all_tensors():
    roles = ("aligned", "tuned", "tuned_2")
    small = dict(zip(roles, (ZERO, FIRST, SECOND), strict=True))
    large = dict(zip(roles, (torch.zeros(40), torch.ones(40), torch.zeros(40)), strict=True))
    sources = {role: Memory({"w": small[role], "v": large[role]}) for role in roles}
    entries = list(sources["tuned"].entries().values())
    edit = with_survey(RamplusTl(RamplusTlConfig(scope="model")), sources, entries)
    assert edit.reach("w") is Reach.POINTWISE
    # The first model changes 41 entries alone and one together with the second, which changes one alone.
    assert edit.factors == pytest.approx((1 + 0.1 / 41, 1.02))
    merged = torch.cat([values for _, values in evaluate(edit, sources, entries[0])])
    assert merged.tolist() == pytest.approx([2, 0, 2 * (1 + 0.1 / 41), 4.08], abs=1e-6)


def test_identical_models_come_back_and_disjoint_ones_add_up():
    random = torch.Generator().manual_seed(2)
    base, tuned = torch.randn(6, 7, generator=random), torch.randn(6, 7, generator=random)
    config = RamplusTlConfig(epsilon=0.0)
    assert torch.allclose(run(RamplusTl(config), base, tuned, tuned), tuned, atol=1e-6)
    assert torch.allclose(run(RamplusTl(config), base, tuned, base), tuned, atol=1e-6)


def test_settings_out_of_range_are_refused():
    for name in ("epsilon", "r", "alpha"):
        with pytest.raises(ConfigError, match=f"'{name}' is out of range"):
            RamplusTlConfig(**{name: -0.1})
    with pytest.raises(ConfigError, match="'scope' is not a known choice"):
        RamplusTlConfig(scope="layer")
    assert RamplusTl.search_space is None
