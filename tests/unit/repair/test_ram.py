# SPDX-License-Identifier: Apache-2.0
"""RAM: the tests of its sheet."""

from __future__ import annotations

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.ram import Ram, RamConfig, ram
from keelwright.repair.task_arithmetic import TaskArithmetic
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
    config = RamConfig(epsilon=0.01)
    assert ram(ZERO, [FIRST, SECOND], config).tolist() == [2, 0, 2, 4]
    assert run(Ram(config), ZERO, FIRST, SECOND, chunk=3).tolist() == [2, 0, 2, 4]


def test_changes_up_to_the_threshold_count_as_none():
    config = RamConfig(epsilon=0.5)
    assert run(Ram(config), ZERO, row(0.5, 0.51, -0.5, -0.6), row(0, 0, 1, 0)).tolist() == pytest.approx(
        [0, 0.51, 1, -0.6]
    )


def test_disjoint_supports_add_up_as_in_task_arithmetic():
    random = torch.Generator().manual_seed(1)
    base, first, second = (torch.randn(40, generator=random) for _ in range(3))
    takes = torch.rand(40, generator=random) < 0.5
    first, second = torch.where(takes, first, base), torch.where(takes, base, second)
    merged = run(Ram(RamConfig(epsilon=0.0)), base, first, second)
    assert torch.allclose(merged, run(TaskArithmetic(models=2), base, first, second), atol=1e-6)


def test_identical_models_come_back_and_a_huge_threshold_leaves_the_base():
    random = torch.Generator().manual_seed(2)
    base, tuned = torch.randn(6, 7, generator=random), torch.randn(6, 7, generator=random)
    assert torch.allclose(run(Ram(RamConfig(epsilon=0.0), 3), base, tuned, tuned, tuned), tuned, atol=1e-6)
    assert torch.equal(run(Ram(RamConfig(epsilon=1e6), 2), base, tuned, tuned), base)


def test_one_model_of_which_every_change_counts_is_copied():
    assert Ram(RamConfig(epsilon=0.0), 1).reach("w") is Reach.COPY
    assert Ram(RamConfig(), 1).reach("w") is Reach.POINTWISE


def test_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="'epsilon' is out of range"):
        RamConfig(epsilon=-1e-5)
    assert Ram.search_space is None
