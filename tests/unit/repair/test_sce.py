# SPDX-License-Identifier: Apache-2.0
"""SCE: the tests of its sheet."""

from __future__ import annotations

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.sce import Sce, SceConfig, model_weights, sce, variance
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


ZERO = torch.zeros(4)
FIRST, SECOND = row(1, 2, -1, 0), row(3, 0, 3, 4)


@pytest.mark.parametrize(("share", "expected"), [(1.0, [2.7, 2, 3, 4]), (0.5, [0, 0, 3, 4]), (0.2, [0, 0, 0, 0])])
def test_known_answers_of_the_sheet(share, expected):
    config = SceConfig(select_topk=share)
    assert sce(ZERO, [FIRST, SECOND], config).tolist() == pytest.approx(expected, abs=1e-6)
    for chunk in (1 << 18, 3):
        assert run(Sce(config), ZERO, FIRST, SECOND, chunk=chunk).tolist() == pytest.approx(expected, abs=1e-6)


def test_known_weights_of_the_sheet():
    assert model_weights([6.0, 34.0], 4, legacy=False) == pytest.approx([0.15, 0.85])
    assert model_weights([1.0, 25.0], 4, legacy=False) == pytest.approx([0.03846, 0.96154], abs=1e-5)
    assert model_weights([0.0, 0.0], 4, legacy=False) == [0.5, 0.5]


def test_small_changes_are_weighed_by_their_size_and_equally_in_legacy_mode():
    first, second = 1e-4 * torch.ones(4), 3e-4 * torch.ones(4)
    assert run(Sce(SceConfig()), ZERO, first, second)[0].item() == pytest.approx(0.1 * 1e-4 + 0.9 * 3e-4, rel=1e-5)
    assert run(Sce(SceConfig(legacy=True)), ZERO, first, second)[0].item() == pytest.approx(2e-4, rel=1e-5)


def test_of_equal_variances_the_lowest_index_is_selected(monkeypatch):
    monkeypatch.setattr(threshold, "_BLOCK", 16)
    monkeypatch.setattr(stream, "_REDUCTION_ELEMENTS", 16)
    random = torch.Generator().manual_seed(2)
    tuned = [torch.randint(-2, 3, (200,), generator=random).float() for _ in range(3)]
    zero = torch.zeros(200)
    for share in (0.1, 0.33, 0.8):
        config = SceConfig(select_topk=share)
        merged = run(Sce(config, 3), zero, *tuned)
        assert torch.allclose(merged, sce(zero, tuned, config), atol=1e-6)
        varies = int(variance(tuned).count_nonzero())
        assert merged.count_nonzero() <= int(varies * share)


def test_one_model_does_not_vary():
    assert Sce(SceConfig(), 1).copies("w") == "tuned" and Sce(SceConfig(), 1).reach("w") is Reach.COPY
    assert Sce(SceConfig(select_topk=0.5), 1).copies("w") == "aligned"
    base, tuned = row(1, 2, 3, 4), row(1, 0, 3, 7)
    for share, expected in ((1.0, tuned), (0.5, base)):
        assert torch.equal(sce(base, [tuned], SceConfig(select_topk=share)), expected)


def test_equal_models_come_back_and_without_any_change_the_base_does():
    base, tuned = row(1, 2, 3, 4), row(1.5, 0, 3, 7)
    assert run(Sce(), base, tuned, tuned).tolist() == tuned.tolist()
    assert run(Sce(SceConfig(select_topk=0.5)), base, tuned, tuned).tolist() == base.tolist()
    assert run(Sce(), base, base, base).tolist() == base.tolist()


def test_the_minority_is_erased_by_the_unweighted_sum():
    # The second model is heavier but the sum of the changes of the first entry is negative.
    first, second = row(-5, 0, 0, 0), row(4, 50, 0, 0)
    assert run(Sce(), ZERO, first, second).tolist() == [-5, 50, 0, 0]


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="'select_topk' is out of range"):
        SceConfig(select_topk=1.2)
    with pytest.raises(ConfigError, match="does not take 0 tuned models"):
        Sce(models=0)
    assert Sce.search_space is None
