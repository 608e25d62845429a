# SPDX-License-Identifier: Apache-2.0
"""Task arithmetic: known answers, copies, settings."""

from __future__ import annotations

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.task_arithmetic import TaskArithmetic, TaskArithmeticConfig, task_arithmetic
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


BASE, FIRST, SECOND = row(1, 1, 1, 1), row(2, 1, 0, 5), row(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TaskArithmeticConfig(), [2.0, 3.0, 0.0, 5.0]),
        (TaskArithmeticConfig(coefficient=0.5, weight=(1.0, 2.0)), [1.5, 3.0, 0.5, 3.0]),
        (TaskArithmeticConfig(weight=(1.0, 3.0), normalize=True), [1.25, 2.5, 0.75, 2.0]),
        (TaskArithmeticConfig(weight=(1.0, -1.0)), [2.0, -1.0, 0.0, 5.0]),
    ],
)
def test_known_answers_through_the_function_and_the_engine(config, expected):
    assert task_arithmetic(BASE, [FIRST, SECOND], config).tolist() == expected
    assert run(TaskArithmetic(config, 2), BASE, FIRST, SECOND).tolist() == expected


def test_one_model_at_full_strength_is_copied_and_at_none_the_base_is():
    assert TaskArithmetic().reach("w") is Reach.COPY and TaskArithmetic().copies("w") == "tuned"
    none = TaskArithmetic(TaskArithmeticConfig(coefficient=0.0), 2)
    assert none.reach("w") is Reach.COPY and none.copies("w") == "aligned"
    doubled = TaskArithmetic(TaskArithmeticConfig(coefficient=0.5, weight=2.0))
    assert doubled.copies("w") == "tuned" and doubled.reach("w") is Reach.COPY


def test_both_ends_keep_signed_zeros_and_every_bit():
    base, tuned = row(-0.0, 1.0, 0.1), row(0.0, -0.0, 0.3)
    assert run(TaskArithmetic(), base, tuned).numpy().tobytes() == tuned.numpy().tobytes()
    none = TaskArithmetic(TaskArithmeticConfig(coefficient=0.0))
    assert run(none, base, tuned).numpy().tobytes() == base.numpy().tobytes()


def test_the_combination_says_what_the_edit_computes():
    edit = TaskArithmetic(TaskArithmeticConfig(coefficient=0.7, weight=(1.0, 3.0), normalize=True), 2)
    shares = edit.combination()
    assert sum(shares.values()) == pytest.approx(1.0)
    summed = shares["aligned"] * BASE + shares["tuned"] * FIRST + shares["tuned_2"] * SECOND
    assert torch.allclose(run(edit, BASE, FIRST, SECOND), summed, atol=1e-6)


def test_weights_that_cancel_are_not_divided_by():
    config = TaskArithmeticConfig(weight=(0.0, 0.0), normalize=True)
    assert run(TaskArithmetic(config, 2), BASE, FIRST, SECOND).tolist() == BASE.tolist()
    assert TaskArithmetic(config, 2).combination()["aligned"] == 1.0


def test_a_negative_weight_under_normalize_is_refused():
    with pytest.raises(ConfigError, match="cannot be normalised") as caught:
        TaskArithmeticConfig(weight=(1.0, -1.0), normalize=True)
    assert "set normalize to false" in str(caught.value)


def test_a_weight_per_model_must_fit_the_number_of_models():
    with pytest.raises(ConfigError, match="'weight' does not fit the number of models"):
        TaskArithmetic(TaskArithmeticConfig(weight=(1.0, 2.0)), 3)
    with pytest.raises(ConfigError, match="does not take 0 tuned models"):
        TaskArithmetic(models=0)
    with pytest.raises(ConfigError, match="'coefficient' is out of range"):
        TaskArithmeticConfig(coefficient=float("nan"))


def test_the_layout_comes_from_the_first_tuned_model():
    assert TaskArithmetic(models=3).roles() == ("aligned", "tuned_2", "tuned_3", "tuned")
