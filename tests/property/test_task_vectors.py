# SPDX-License-Identifier: Apache-2.0
"""Identities of the base-relative methods over random shapes and values, equal magnitudes and zeros included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keelwright.core.protocols import TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.arcee_fusion import ArceeFusion
from keelwright.repair.breadcrumbs import Breadcrumbs, breadcrumbs
from keelwright.repair.breadcrumbs_ties import BreadcrumbsTies, breadcrumbs_ties
from keelwright.repair.dare_linear import DareLinear, dare_linear
from keelwright.repair.dare_ties import DareTies, dare_ties
from keelwright.repair.della import Della, della
from keelwright.repair.della_linear import DellaLinear, della_linear
from keelwright.repair.ram import Ram, RamConfig
from keelwright.repair.ramplus_tl import RamplusTl, RamplusTlConfig
from keelwright.repair.sce import Sce, SceConfig, sce
from keelwright.repair.task_arithmetic import TaskArithmetic, task_arithmetic
from keelwright.repair.ties import Ties, TiesConfig, ties
from keelwright.weights.edit import model_roles
from keelwright.weights.stream import evaluate
from keelwright.weights.survey import with_survey

RANDOM = (DareLinear, DareTies, Della, DellaLinear)
EXACT = (TaskArithmetic, Ties, Breadcrumbs, BreadcrumbsTies)
FAMILY = (*EXACT, *RANDOM)
DROPPING = tuple(one for one in FAMILY if one is not TaskArithmetic)
FUNCTIONS: dict[Any, Any] = {
    TaskArithmetic: task_arithmetic,
    Ties: ties,
    Breadcrumbs: breadcrumbs,
    BreadcrumbsTies: breadcrumbs_ties,
    DareLinear: dare_linear,
    DareTies: dare_ties,
    Della: della,
    DellaLinear: della_linear,
}

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)
SEEDS = st.integers(0, 2**32)
KINDS = st.sampled_from(["normal", "normal", "duplicates", "constant", "zero"])
DENSITIES = st.sampled_from([0.2, 0.29, 0.5, 0.8])
CHUNKS = st.integers(1, 60)
every_method = pytest.mark.parametrize("method", FAMILY, ids=lambda one: one.__name__)
brief = settings(max_examples=20, deadline=None)


class Memory:
    """One tensor in memory as a source."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def entries(self) -> Mapping[str, TensorEntry]:
        return {"w": TensorEntry("w", STORED_NAMES[self.tensor.dtype], tuple(self.tensor.shape))}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensor.reshape(-1)[start:stop].clone()

    def describe(self) -> str:
        return "memory"


def draw(seed: int, kind: str, shape: tuple[int, ...], models: int) -> list[Tensor]:
    """Return a base and tuned models; `kind` says what their task vectors look like."""
    random = torch.Generator().manual_seed(seed)
    base = torch.randint(-64, 64, shape, generator=random) / 64.0
    tuned = []
    for _ in range(models):
        delta = {
            "normal": lambda: torch.randn(shape, generator=random) / 8.0,
            "duplicates": lambda: torch.randint(-2, 3, shape, generator=random) / 8.0,
            "constant": lambda: torch.full(shape, 0.125),
            "zero": lambda: torch.zeros(shape),
        }[kind]()
        tuned.append(base + delta)
    return [base, *tuned]


def run(edit: Any, tensors: list[Tensor], chunk: int = 1 << 18) -> Tensor:
    """Return what the engine makes of the base and the tuned models."""
    roles = ("aligned", *model_roles(len(tensors) - 1))
    sources: dict[str, Any] = {role: Memory(tensor) for role, tensor in zip(roles, tensors, strict=True)}
    entry = sources["tuned"].entries()["w"]
    edit = with_survey(edit, sources, [entry])
    return torch.cat([values for _, values in evaluate(edit, sources, entry, chunk_elements=chunk)]).view(entry.shape)


def make(method: Any, models: int = 1, **chosen: Any) -> Any:
    """Return the method with those of the settings that it has."""
    names = method.config_class.__dataclass_fields__
    usual = {"epsilon": 0.1, **chosen}
    return method(method.config_class(**{name: value for name, value in usual.items() if name in names}), models)


def raw(tensor: Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


@every_method
@brief
@given(SEEDS, KINDS, SHAPES)
def test_the_ends_return_a_model_byte_for_byte(method: Any, seed: int, kind: str, shape: tuple[int, ...]) -> None:
    tensors = draw(seed, kind, shape, 1)
    assert raw(run(make(method, coefficient=0.0), tensors, 3)) == raw(tensors[0])
    assert raw(run(make(method, density=1.0), tensors, 3)) == raw(tensors[1])


@every_method
@brief
@given(SEEDS, KINDS, SHAPES, DENSITIES, CHUNKS)
def test_the_size_of_the_chunks_changes_no_bit(
    method: Any, seed: int, kind: str, shape: tuple[int, ...], density: float, chunk: int
) -> None:
    tensors = draw(seed, kind, shape, 2)
    for rescale in ("none", "inverse_keep", "l1"):
        edit = make(method, 2, density=density, weight=(0.75, 0.5), rescale=rescale)
        assert raw(run(edit, tensors, chunk)) == raw(run(edit, tensors))


@every_method
@brief
@given(SEEDS, KINDS, SHAPES, DENSITIES)
def test_the_engine_agrees_with_the_function(
    method: Any, seed: int, kind: str, shape: tuple[int, ...], density: float
) -> None:
    base, *tuned = draw(seed, kind, shape, 3)
    for rescale in ("none", "inverse_keep", "l1"):
        edit = make(method, 3, density=density, weight=(0.75, 0.5, 0.3), rescale=rescale)
        named = {"name": "w"} if method in RANDOM else {}
        expected = FUNCTIONS[method](base, tuned, edit.config, **named)
        assert torch.allclose(run(edit, [base, *tuned]), expected, rtol=0, atol=1e-6)


@every_method
@brief
@given(SEEDS, SHAPES, DENSITIES)
def test_a_sixteen_bit_output_is_rounded_once(method: Any, seed: int, shape: tuple[int, ...], density: float) -> None:
    tensors = [tensor.bfloat16() for tensor in draw(seed, "normal", shape, 2)]
    edit = make(method, 2, density=density)
    assert raw(run(edit, tensors)) == raw(run(edit, [tensor.float() for tensor in tensors]).bfloat16())


@every_method
@brief
@given(SEEDS, KINDS, SHAPES, DENSITIES)
def test_a_model_without_changes_has_no_effect(
    method: Any, seed: int, kind: str, shape: tuple[int, ...], density: float
) -> None:
    base, tuned = draw(seed, kind, shape, 1)
    alone = run(make(method, 1, density=density, coefficient=0.5), [base, tuned])
    assert torch.equal(run(make(method, 2, density=density, coefficient=0.5), [base, tuned, base]), alone)
    assert torch.equal(run(make(method, 2, density=density), [base, base, base]), base)


@every_method
@brief
@given(SEEDS, KINDS, SHAPES, DENSITIES, st.integers(-3, 3))
def test_a_common_scale_comes_out_again(
    method: Any, seed: int, kind: str, shape: tuple[int, ...], density: float, power: int
) -> None:
    tensors = draw(seed, kind, shape, 2)
    edit = make(method, 2, density=density, weight=(0.75, 0.5))
    scaled = run(edit, [tensor * 2.0**power for tensor in tensors])
    assert torch.equal(scaled, run(edit, tensors) * 2.0**power)


@pytest.mark.parametrize("method", EXACT, ids=lambda one: one.__name__)
@brief
@given(SEEDS, KINDS, SHAPES, DENSITIES)
def test_the_order_of_the_models_does_not_matter(
    method: Any, seed: int, kind: str, shape: tuple[int, ...], density: float
) -> None:
    base, one, two, three = draw(seed, kind, shape, 3)
    # Powers of two: sums of the weights, which decide how a division rounds, are then exact in any order.
    there = run(make(method, 2, density=density, weight=(0.5, 2.0)), [base, one, two])
    assert raw(run(make(method, 2, density=density, weight=(2.0, 0.5)), [base, two, one])) == raw(there)
    if kind == "normal":  # sums of three that cancel to nothing in one order only would turn an election
        there = run(make(method, 3, density=density, weight=(0.5, 1.5, 1.0)), [base, one, two, three])
        back = run(make(method, 3, density=density, weight=(1.0, 0.5, 1.5)), [base, three, one, two])
        assert torch.allclose(there, back, rtol=0, atol=1e-6)


@brief
@given(SEEDS, KINDS, SHAPES)
def test_with_everything_kept_the_names_fall_together(seed: int, kind: str, shape: tuple[int, ...]) -> None:
    tensors = draw(seed, kind, shape, 3)
    chosen = {"density": 1.0, "weight": (0.5, 1.0, -0.3), "normalize": False, "coefficient": 0.7}
    plain = run(make(TaskArithmetic, 3, **chosen), tensors)
    for method in (DareLinear, Breadcrumbs, DellaLinear):
        assert torch.equal(run(make(method, 3, **chosen), tensors), plain)
    elected = run(make(Ties, 3, **chosen), tensors)
    for method in (DareTies, BreadcrumbsTies, Della):
        assert torch.equal(run(make(method, 3, **chosen), tensors), elected)


@pytest.mark.parametrize("method", [Ties, Breadcrumbs, BreadcrumbsTies], ids=lambda one: one.__name__)
@brief
@given(SEEDS, st.integers(1, 200), DENSITIES)
def test_the_count_is_met_exactly_among_equal_magnitudes(method: Any, seed: int, size: int, density: float) -> None:
    random = torch.Generator().manual_seed(seed)
    tuned = torch.randint(1, 4, (size,), generator=random) * torch.where(
        torch.rand(size, generator=random) < 0.5, -1.0, 1.0
    )
    merged = run(make(method, density=density, gamma=0.1), [torch.zeros(size), tuned], 13)
    assert int(merged.count_nonzero()) == max(1, int(density * size))
    assert bool((merged[merged != 0] == tuned[merged != 0]).all())


@brief
@given(SEEDS, KINDS, SHAPES, DENSITIES, CHUNKS)
def test_for_a_model_of_one_tensor_both_scopes_of_ties_are_the_same(
    seed: int, kind: str, shape: tuple[int, ...], density: float, chunk: int
) -> None:
    tensors = draw(seed, kind, shape, 2)
    config = TiesConfig(density=density, zero_sign="majority", rescale="l1")
    here = run(Ties(config, 2), tensors, chunk)
    assert torch.equal(run(Ties(replace(config, trim_scope="model"), 2), tensors, chunk), here)


@brief
@given(SEEDS, KINDS, SHAPES, CHUNKS, st.sampled_from([0.1, 0.5, 1.0]))
def test_the_other_methods_do_not_depend_on_chunks_and_keep_equal_models(
    seed: int, kind: str, shape: tuple[int, ...], chunk: int, share: float
) -> None:
    base, one, two = draw(seed, kind, shape, 2)
    edits: list[Any] = [Sce(SceConfig(select_topk=share)), Ram(RamConfig(epsilon=0.01))]
    edits += [RamplusTl(RamplusTlConfig(epsilon=0.01, scope=scope)) for scope in ("tensor", "model")]
    for edit in edits:
        assert raw(run(edit, [base, one, two], chunk)) == raw(run(edit, [base, one, two]))
        assert torch.allclose(run(edit, [base, two, one]), run(edit, [base, one, two]), rtol=0, atol=1e-6)
        assert torch.equal(run(edit, [base, base, base]), base)
    assert torch.allclose(run(Sce(), [base, one, one]), one, rtol=0, atol=1e-6)
    fused = run(ArceeFusion(), [base, one], chunk)
    assert raw(fused) == raw(run(ArceeFusion(), [base, one]))
    assert bool(((fused == base) | (fused == one)).all())
    assert torch.equal(run(ArceeFusion(), [base, base]), base)


@brief
@given(SEEDS, KINDS, SHAPES, st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_sce_agrees_with_its_function(seed: int, kind: str, shape: tuple[int, ...], share: float) -> None:
    base, *tuned = draw(seed, kind, shape, 3)
    for legacy in (False, True):
        config = SceConfig(select_topk=share, legacy=legacy)
        found = run(Sce(config, 3), [base, *tuned], 11)
        assert torch.allclose(found, sce(base, tuned, config), rtol=0, atol=1e-6)
