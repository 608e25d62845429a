# SPDX-License-Identifier: Apache-2.0
"""Model Breadcrumbs: the tests of its sheet."""

from __future__ import annotations

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.breadcrumbs import Breadcrumbs, BreadcrumbsConfig, breadcrumbs
from keelwright.weights import stream, threshold
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


DELTA = row(0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1.0)


@pytest.mark.parametrize(
    ("density", "gamma", "first", "last"),
    [(0.6, 0.1, 3, 8), (0.9, 0.3, 0, 8), (0.3, 0.0, 7, 9), (1.0, 0.5, 0, 9)],
)
def test_known_answers_of_the_sheet(density, gamma, first, last):
    config = BreadcrumbsConfig(density=density, gamma=gamma)
    expected = torch.zeros(10)
    expected[first : last + 1] = DELTA[first : last + 1]
    assert torch.equal(breadcrumbs(torch.zeros(10), [DELTA], config), expected)
    for chunk in (1 << 18, 3):
        assert torch.equal(run(Breadcrumbs(config), torch.zeros(10), DELTA, chunk=chunk), expected)


@pytest.mark.parametrize(("density", "gamma"), [(0.29, 0.03), (0.5, 0.1), (0.9, 0.01), (0.7, 0.7), (0.02, 0.4)])
def test_exact_counts_where_magnitudes_repeat(density, gamma, monkeypatch):
    monkeypatch.setattr(threshold, "_BLOCK", 32)
    monkeypatch.setattr(stream, "_REDUCTION_ELEMENTS", 32)
    random = torch.Generator().manual_seed(4)
    tuned = torch.randint(1, 5, (300,), generator=random).float()
    config = BreadcrumbsConfig(density=density, gamma=gamma)
    merged = run(Breadcrumbs(config), torch.zeros(300), tuned)
    kept = int(density * 300)
    assert merged.count_nonzero() == kept
    assert torch.equal(merged, breadcrumbs(torch.zeros(300), [tuned], config))
    bottom = max(0, 300 - kept - int(gamma * 300))
    assert sorted(merged[merged != 0].tolist()) == sorted(tuned.tolist())[bottom : bottom + kept]


def test_each_model_has_its_own_shares():
    base, first, second = torch.zeros(4), row(1, 2, 3, 4), row(40, 30, 20, 10)
    config = BreadcrumbsConfig(density=(0.5, 0.25), gamma=(0.25, 0.0))
    assert run(Breadcrumbs(config, 2), base, first, second).tolist() == [40, 2, 3, 0]


def test_rescaling_keeps_the_sum_of_magnitudes_or_divides_by_the_density():
    config = BreadcrumbsConfig(density=0.6, gamma=0.1, rescale="l1")
    merged = run(Breadcrumbs(config), torch.zeros(10), DELTA, chunk=4)
    assert merged.abs().sum().item() == pytest.approx(DELTA.abs().sum().item(), rel=1e-6)
    inverse = run(
        Breadcrumbs(BreadcrumbsConfig(density=0.6, gamma=0.1, rescale="inverse_keep")), torch.zeros(10), DELTA
    )
    assert inverse[3].item() == pytest.approx(-0.4 / 0.6, rel=1e-6) and inverse[9].item() == 0.0


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="'gamma' is out of range"):
        BreadcrumbsConfig(gamma=1.5)
    with pytest.raises(ConfigError, match="'gamma' does not fit"):
        Breadcrumbs(BreadcrumbsConfig(gamma=(0.1, 0.2)), 3)
    assert Breadcrumbs().reach("w") is Reach.REDUCED
    assert Breadcrumbs(BreadcrumbsConfig(density=1.0)).copies("w") == "tuned"
