# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from keelwright.core.errors import NumericalError
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.weights.stream import as_bytes, evaluate, walk


def whole(edit: Any, sources: Any, name: str, **settings: int) -> Tensor:
    entry = sources[edit.roles()[-1]].entries()[name]
    return torch.cat([values for _, values in evaluate(edit, sources, entry, **settings)])


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_do_not_depend_on_the_size_of_chunks(
    memory: Any, make_tensors: Callable[..., dict[str, Tensor]], dtype: torch.dtype, chunk: int
) -> None:
    sources = {"aligned": memory(make_tensors(1, dtype)), "tuned": memory(make_tensors(2, dtype))}
    name = "model.layers.0.mlp.weight"
    expected = whole(Linear(LinearConfig(0.3)), sources, name, chunk_elements=1000)
    found = whole(Linear(LinearConfig(0.3)), sources, name, chunk_elements=chunk)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("chunk", [1, 5, 1 << 18])
def test_reductions_do_not_depend_on_the_size_of_chunks(memory: Any, centered: Any, chunk: int) -> None:
    values = torch.randn(7, 13, generator=torch.Generator().manual_seed(0))
    found = whole(centered, {"tuned": memory({"w": values})}, "w", chunk_elements=chunk)
    expected = values.flatten() - float(values.double().sum()) / values.numel()
    assert torch.equal(found, expected)


def test_a_reduction_longer_than_a_block_sums_every_block(memory: Any, centered: Any) -> None:
    values = torch.ones(3 * (1 << 18) // 2)
    values[-1] = 2.0 + values.numel()
    found = whole(centered, {"tuned": memory({"w": values})}, "w")
    assert float(found[0]) == pytest.approx(1.0 - (values.numel() + 1 + values.numel()) / values.numel(), abs=1e-6)


def test_a_matrix_edit_sees_the_whole_tensor_in_its_own_shape(memory: Any, flipped: Any) -> None:
    values = torch.arange(12.0).view(3, 4)
    found = whole(flipped, {"tuned": memory({"w": values})}, "w", chunk_elements=2)
    assert torch.equal(found.view(3, 4), values.flip(0))


def test_the_result_is_the_float32_evaluation_rounded_once(
    memory: Any, make_tensors: Callable[..., dict[str, Tensor]]
) -> None:
    aligned, tuned = make_tensors(1), make_tensors(2)
    found = whole(Linear(LinearConfig(0.3)), {"aligned": memory(aligned), "tuned": memory(tuned)}, "lm_head.weight")
    a, t = aligned["lm_head.weight"].flatten().float(), tuned["lm_head.weight"].flatten().float()
    assert torch.equal(found, ((1.0 - 0.3) * a + 0.3 * t).to(torch.bfloat16))


def test_inputs_of_other_dtypes_are_widened_and_the_layout_gives_the_output_dtype(memory: Any) -> None:
    sources = {
        "aligned": memory({"w": torch.tensor([1.0], dtype=torch.float32)}),
        "tuned": memory({"w": torch.tensor([2.0], dtype=torch.bfloat16)}),
    }
    found = whole(Linear(LinearConfig(0.5)), sources, "w")
    assert found.dtype is torch.bfloat16
    assert found.item() == 1.5


def test_double_precision_is_kept_where_the_output_is_double(memory: Any) -> None:
    a, t = torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.0 + 1e-12], dtype=torch.float64)
    found = whole(Linear(LinearConfig(0.5)), {"aligned": memory({"w": a}), "tuned": memory({"w": t})}, "w")
    assert 0 < found.item() - 1.0 < 1e-12


def test_copies_move_bytes_signed_zeros_included(memory: Any) -> None:
    values = torch.tensor([-0.0, 0.0, 1.5], dtype=torch.bfloat16)
    sources = {"aligned": memory({"w": values}), "tuned": memory({"w": values + 1})}
    found = whole(Linear(LinearConfig(0.0)), sources, "w")
    assert bytes(as_bytes(found)) == bytes(as_bytes(values))


def test_tensors_that_are_no_weights_are_copied_from_the_layout(memory: Any) -> None:
    ids = torch.arange(5)
    sources = {"aligned": memory({"ids": ids}), "tuned": memory({"ids": ids})}
    found = whole(Linear(LinearConfig(0.5)), sources, "ids", chunk_elements=2)
    assert torch.equal(found, ids)


@pytest.mark.parametrize("coefficient", [0.5, 1.0])
def test_an_input_that_is_no_number_is_refused_even_where_it_is_only_copied(memory: Any, coefficient: float) -> None:
    good, bad = torch.zeros(9), torch.zeros(9)
    bad[4] = float("nan")
    sources = {"aligned": memory({"w": good}), "tuned": memory({"w": bad}, "models/tuned")}
    with pytest.raises(NumericalError) as caught:
        whole(Linear(LinearConfig(coefficient)), sources, "w", chunk_elements=3)
    assert "'tuned' has a weight that is not a number: tensor 'w', element 4" in caught.value.problem


def test_an_overflow_of_half_precision_names_the_element(memory: Any) -> None:
    from keelwright.repair.resta import Resta, RestaConfig

    big = torch.tensor([0.0, 60000.0], dtype=torch.float16)
    sources = {"aligned": memory({"w": big}), "unaligned": memory({"w": -big}), "tuned": memory({"w": big})}
    with pytest.raises(NumericalError, match="element 1"):
        whole(Resta(RestaConfig(1.0)), sources, "w")


def test_an_empty_tensor_and_a_scalar_stream(memory: Any) -> None:
    tensors = {"none": torch.empty(0, 3), "one": torch.tensor(2.0)}
    sources = {"aligned": memory(tensors), "tuned": memory(tensors)}
    assert list(evaluate(Linear(LinearConfig(0.5)), sources, sources["tuned"].entries()["none"])) == []
    assert whole(Linear(LinearConfig(0.5)), sources, "one").tolist() == [2.0]


def test_the_layout_values_come_beside_the_edited_ones(memory: Any) -> None:
    sources = {"aligned": memory({"w": torch.zeros(3)}), "tuned": memory({"w": torch.ones(3)})}
    for edit in (Linear(LinearConfig(0.0)), Linear(LinearConfig(0.5))):
        (part,) = walk(edit, sources, sources["tuned"].entries()["w"], beside="tuned")
        assert torch.equal(part.beside, torch.ones(3))


def test_an_edit_that_returns_another_size_is_a_bug_and_not_written(memory: Any, flipped: Any) -> None:
    class Shortened(type(flipped)):  # type: ignore[misc]
        def edit(self, name: str, chunk: Any, stats: Any) -> Tensor:
            return chunk.tensors["tuned"][:1]

    with pytest.raises(ValueError, match="returned 4 values for 12"):
        whole(Shortened(), {"tuned": memory({"w": torch.zeros(3, 4)})}, "w")
