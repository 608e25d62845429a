# SPDX-License-Identifier: Apache-2.0
"""Arcee fusion: the tests of its sheet."""

from __future__ import annotations

import math

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.arcee_fusion import ArceeFusion, ArceeFusionConfig, arcee_fusion, divergences, quartile_ranks
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


ZERO = torch.zeros(5)
TUNED = row(0.1, 0.2, 0.3, 0.4, 2)


def test_known_answer_of_the_sheet():
    assert arcee_fusion(ZERO, TUNED, ArceeFusionConfig()).tolist() == [0, 0, 0, 0, 2]
    assert run(ArceeFusion(), ZERO, TUNED).tolist() == [0, 0, 0, 0, 2]


def naive(base, tuned):
    """Return the fusion in double precision, by sorting."""
    base, tuned = base.double(), tuned.double()
    p, q = tuned.softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    weight = (tuned - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = weight.flatten().sort().values
    first, median, third = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return torch.where(weight >= median + 1.5 * (third - first), tuned, base).float()


@pytest.mark.parametrize("shape", [(37,), (20, 31), (4, 6, 9), (5, 2)])
@pytest.mark.parametrize("chunk", [1 << 18, 60])
def test_random_tensors_agree_with_a_naive_fusion_whatever_the_chunks(shape, chunk):
    random = torch.Generator().manual_seed(5)
    base = torch.randn(shape, generator=random)
    tuned = base + 0.01 * torch.randn(shape, generator=random) ** 3
    merged = run(ArceeFusion(), base, tuned, chunk=chunk)
    assert torch.equal(merged, naive(base, tuned))
    assert 0 < (merged != base).sum() < (tuned != base).sum()
    assert torch.equal(merged, arcee_fusion(base, tuned, ArceeFusionConfig()))


def test_every_entry_comes_from_one_of_the_two_models():
    random = torch.Generator().manual_seed(6)
    base, tuned = torch.randn(30, 8, generator=random), torch.randn(30, 8, generator=random)
    merged = run(ArceeFusion(), base, tuned)
    assert bool(((merged == base) | (merged == tuned)).all())


@pytest.mark.parametrize("shape", [(6,), (3, 4), (7, 1), (1,), ()])
def test_where_nothing_stands_out_the_aligned_weights_stay(shape):
    base = torch.zeros(shape)
    for tuned in (base.clone(), torch.ones(shape)):
        assert torch.equal(run(ArceeFusion(), base, tuned), base)
        assert torch.equal(arcee_fusion(base, tuned, ArceeFusionConfig()), base)


def test_the_coefficient_scales_what_is_taken_over():
    half = ArceeFusion(ArceeFusionConfig(coefficient=0.5))
    assert run(half, ZERO, TUNED).tolist() == [0, 0, 0, 0, 1]
    none = ArceeFusion(ArceeFusionConfig(coefficient=0.0))
    assert none.reach("w") is Reach.COPY and none.copies("w") == "aligned"
    assert ArceeFusion().shares() == half.shares() is not None and none.shares() is None


def test_the_divergence_of_a_row_is_that_of_its_softmax():
    shift = divergences(torch.zeros(1, 2), row(math.log(3), 0).view(1, 2)).item()
    assert shift == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-7)
    assert divergences(torch.zeros(2, 3), torch.ones(2, 3)).tolist() == [0, 0]


def test_quartiles_are_counted_down_from_the_largest():
    assert quartile_ranks(5) == (4, 3, 2) and quartile_ranks(1) == (1, 1, 1) and quartile_ranks(4) == (4, 3, 2)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="'coefficient' is out of range"):
        ArceeFusionConfig(coefficient=1.5)
