# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from keelwright.core.errors import ModelMismatchError
from keelwright.models.checkpoint import Checkpoint
from keelwright.weights.inspect import diff, group_differences, info


def test_info_counts_what_the_headers_say(make_folder):
    tensors = {"model.layers.10.w": torch.zeros(3, 4), "model.layers.2.w": torch.zeros(2, dtype=torch.bfloat16)}
    found = info(Checkpoint(make_folder("model", {**tensors, "ids": torch.arange(3)}, files=2)), tensors=True)
    assert (found["tensors"], found["parameters"], found["bytes"]) == (3, 14, 48 + 4 + 24)
    assert found["elements_by_dtype"] == {"F32": 12, "I64": 3, "BF16": 2}
    assert [one["name"] for one in found["entries"]] == ["ids", "model.layers.2.w", "model.layers.10.w"]
    assert sum(one["tensors"] for one in found["files"]) == 3 and found["digest"].startswith("sha256:")


def test_a_known_difference_is_measured(memory):
    first = memory({"w": torch.tensor([3.0, 4.0, 0.0]), "same": torch.ones(2)})
    second = memory({"w": torch.tensor([3.0, 0.0, 4.0]), "same": torch.ones(2)})
    found = diff(first, second)
    assert (found["equal"], found["compared"], found["changed_elements"], found["elements"]) == (1, 2, 2, 5)
    (row,) = found["tensors"]
    assert row["name"] == "w" and row["changed"] == 2 and row["largest"] == 4.0
    assert row["relative_norm"] == pytest.approx(math.sqrt(32) / 5) and row["cosine"] == pytest.approx(9 / 25)


def test_equal_numbers_in_another_dtype_are_equal(memory):
    first = memory({"w": torch.tensor([1.0, -2.0])})
    second = memory({"w": torch.tensor([1.0, -2.0], dtype=torch.bfloat16)})
    found = diff(first, second)
    assert found["equal"] == 1 and found["other_dtype"] == ["w"] and found["tensors"] == []


def test_names_and_shapes_of_one_side_are_listed(memory):
    first = memory({"w": torch.ones(2), "a": torch.ones(1), "s": torch.ones(3)})
    second = memory({"w": torch.ones(2), "b": torch.ones(1), "s": torch.ones(4)})
    found = diff(first, second)
    assert (found["only_first"], found["only_second"], found["other_shape"]) == (["a"], ["b"], ["s"])


def test_nan_is_counted_and_left_out_of_the_figures(memory):
    first = memory({"w": torch.tensor([1.0, float("nan"), 2.0])})
    second = memory({"w": torch.tensor([1.0, 5.0, 2.0])})
    (row,) = diff(first, second)["tensors"]
    assert row["nonfinite"] == 1 and row["relative_norm"] == 0.0


def test_a_zero_tensor_that_changes_has_no_finite_relative_norm(memory):
    found = diff(memory({"w": torch.zeros(2)}), memory({"w": torch.ones(2)}))["tensors"][0]
    assert found["relative_norm"] == math.inf and found["cosine"] == 0.0


def test_two_models_with_nothing_in_common_are_an_error(memory):
    with pytest.raises(ModelMismatchError, match="have no tensor in common"):
        diff(memory({"a": torch.ones(1)}), memory({"b": torch.ones(1)}))


def test_layers_are_put_together_and_the_largest_change_comes_first():
    def row(name, relative, changed=1):
        return {"name": name, "elements": 2, "changed": changed, "relative_norm": relative, "cosine": 1.0 - relative}

    found = group_differences([row("layers.0.a", 0.1), row("layers.1.a", 0.3, 2), row("b", 0.2)])
    assert [(one["tensors"], one["count"]) for one in found] == [("layers.*.a", 2), ("b", 1)]
    assert found[0]["changed"] == 0.75 and found[0]["relative_norm"] == 0.3 and found[0]["cosine"] == 0.7
