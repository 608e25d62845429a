# SPDX-License-Identifier: Apache-2.0
"""Identities of the weight edits over random shapes, dtypes, values and coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keelwright.core.protocols import TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.linear import Linear, LinearConfig, linear
from keelwright.repair.resta import Resta, RestaConfig, resta
from keelwright.weights.stream import evaluate

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SHAPES = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple)
SEEDS = st.integers(0, 2**32)
INSIDE = st.floats(0.001, 0.999)


class Memory:
    """One tensor in memory as a source."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def entries(self) -> Mapping[str, TensorEntry]:
        return {"w": TensorEntry("w", STORED_NAMES[self.tensor.dtype], tuple(self.tensor.shape))}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensor.flatten()[start:stop].clone()

    def describe(self) -> str:
        return "memory"


def draw(seed: int, shape: tuple[int, ...], dtype: torch.dtype, models: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random).to(dtype) for _ in range(models)]


def raw(tensor: Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


def run(edit: Any, tensors: list[Tensor], chunk: int) -> Tensor:
    sources = {role: Memory(tensor) for role, tensor in zip(edit.roles(), tensors, strict=True)}
    return torch.cat(
        [
            values
            for _, values in evaluate(edit, sources, sources[edit.roles()[-1]].entries()["w"], chunk_elements=chunk)
        ]
    )


def ulp(tensor: Tensor) -> Tensor:
    """The distance to the next number of the tensor's dtype, at each value, in double precision."""
    return torch.finfo(tensor.dtype).eps * tensor.double().abs().clamp(min=torch.finfo(tensor.dtype).tiny)


@given(SEEDS, SHAPES, DTYPES)
def test_the_ends_of_linear_return_an_input_byte_for_byte(seed: int, shape: tuple[int, ...], dtype: Any) -> None:
    aligned, tuned = draw(seed, shape, dtype, 2)
    for coefficient, model in ((0.0, aligned), (1.0, tuned)):
        assert raw(run(Linear(LinearConfig(coefficient)), [aligned, tuned], 3)) == raw(model)


@given(SEEDS, SHAPES, DTYPES, INSIDE)
def test_a_model_merged_with_itself_stays_to_the_bit(
    seed: int, shape: tuple[int, ...], dtype: Any, coefficient: float
) -> None:
    (model,) = draw(seed, shape, dtype, 1)
    assert raw(run(Linear(LinearConfig(coefficient)), [model, model.clone()], 4)) == raw(model)


@given(SEEDS, SHAPES, DTYPES, INSIDE, st.integers(1, 50))
def test_the_engine_gives_the_bits_of_the_function_for_every_chunk(
    seed: int, shape: tuple[int, ...], dtype: Any, coefficient: float, chunk: int
) -> None:
    aligned, unaligned, tuned = draw(seed, shape, dtype, 3)
    mixed = run(Linear(LinearConfig(coefficient)), [aligned, tuned], chunk)
    assert raw(mixed) == raw(linear(aligned, tuned, coefficient=coefficient))
    added = run(Resta(RestaConfig(coefficient)), [aligned, unaligned, tuned], chunk)
    assert raw(added) == raw(resta(aligned, unaligned, tuned, coefficient=coefficient))


@given(SEEDS, SHAPES, DTYPES, INSIDE)
def test_linear_is_within_one_rounding_of_the_exact_value(
    seed: int, shape: tuple[int, ...], dtype: Any, coefficient: float
) -> None:
    aligned, tuned = draw(seed, shape, dtype, 2)
    exact = (1.0 - coefficient) * aligned.double() + coefficient * tuned.double()
    error = (linear(aligned, tuned, coefficient=coefficient).double() - exact).abs()
    # Half a unit of the output, and the float32 error of a sum that may cancel.
    scale = torch.maximum(aligned.double().abs(), tuned.double().abs())
    assert bool((error <= 0.5 * ulp(exact.to(dtype)) + 4 * torch.finfo(torch.float32).eps * scale).all())


@given(SEEDS, SHAPES, INSIDE)
def test_swapping_the_models_and_the_weights_changes_nothing(
    seed: int, shape: tuple[int, ...], coefficient: float
) -> None:
    aligned, tuned = draw(seed, shape, torch.float32, 2)
    there = linear(aligned, tuned, coefficient=coefficient)
    back = linear(tuned, aligned, coefficient=1.0 - coefficient)
    # 1 - (1 - c) may differ from c in the last place of a double, so this is no equality of bits.
    assert torch.allclose(there, back, rtol=0, atol=1e-6)


@given(SEEDS, SHAPES, INSIDE)
def test_linear_moves_by_its_coefficient_along_the_difference(
    seed: int, shape: tuple[int, ...], coefficient: float
) -> None:
    base, delta = draw(seed, shape, torch.float32, 2)
    found = linear(base, base + delta, coefficient=coefficient)
    assert torch.allclose(found, base + coefficient * delta, rtol=0, atol=1e-5)


@given(SEEDS, SHAPES, DTYPES)
def test_resta_without_strength_returns_the_tuned_model_byte_for_byte(
    seed: int, shape: tuple[int, ...], dtype: Any
) -> None:
    aligned, unaligned, tuned = draw(seed, shape, dtype, 3)
    assert raw(run(Resta(RestaConfig(0.0)), [aligned, unaligned, tuned], 5)) == raw(tuned)


@given(SEEDS, SHAPES, DTYPES, st.floats(0, 8))
def test_resta_with_an_aligned_unaligned_model_changes_no_value(
    seed: int, shape: tuple[int, ...], dtype: Any, coefficient: float
) -> None:
    aligned, tuned = draw(seed, shape, dtype, 2)
    assert torch.equal(resta(aligned, aligned.clone(), tuned, coefficient=coefficient), tuned)


@given(SEEDS, SHAPES, INSIDE, INSIDE)
def test_resta_is_additive_in_its_strength(seed: int, shape: tuple[int, ...], one: float, two: float) -> None:
    aligned, unaligned, tuned = draw(seed, shape, torch.float32, 3)
    once = resta(aligned, unaligned, tuned, coefficient=one + two)
    twice = resta(aligned, unaligned, resta(aligned, unaligned, tuned, coefficient=one), coefficient=two)
    assert torch.allclose(once, twice, rtol=0, atol=1e-5)


@settings(max_examples=25)
@given(SEEDS, INSIDE)
def test_a_permutation_of_the_elements_permutes_the_result(seed: int, coefficient: float) -> None:
    aligned, unaligned, tuned = draw(seed, (97,), torch.bfloat16, 3)
    order = torch.randperm(97, generator=torch.Generator().manual_seed(seed))
    for edit, models in (
        (Linear(LinearConfig(coefficient)), [aligned, tuned]),
        (Resta(RestaConfig(coefficient)), [aligned, unaligned, tuned]),
    ):
        plain = run(edit, models, 16)
        assert raw(run(edit, [model[order] for model in models], 16)) == raw(plain[order])


@given(SEEDS, SHAPES, INSIDE)
def test_a_combination_says_what_the_edit_computes(seed: int, shape: tuple[int, ...], coefficient: float) -> None:
    tensors = draw(seed, shape, torch.float32, 3)
    for edit, models in (
        (Linear(LinearConfig(coefficient)), tensors[:2]),
        (Resta(RestaConfig(coefficient)), tensors),
    ):
        weights = edit.combination()
        summed = sum(weights[role] * model.double() for role, model in zip(edit.roles(), models, strict=True))
        assert isinstance(summed, Tensor)
        assert torch.allclose(run(edit, models, 7).double(), summed.flatten(), rtol=0, atol=1e-5)
