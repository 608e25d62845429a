# SPDX-License-Identifier: Apache-2.0
"""Identities of the repairs made for safety, over random shapes, values and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keelwright.core.protocols import TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.ops.concrete import logit_count
from keelwright.repair.lox import Lox, LoxConfig
from keelwright.repair.resta import Resta, RestaConfig, resta
from keelwright.repair.resta_d import RestaD, RestaDConfig
from keelwright.repair.safe_delta import LayerInputs, SafeDelta, SafeDeltaConfig
from keelwright.repair.safe_lora import SafeLora, SafeLoraConfig, projected_drift
from keelwright.repair.safemerge import Safemerge, SafemergeConfig
from keelwright.repair.somf import Somf, SomfConfig
from keelwright.weights.masks import Mask
from keelwright.weights.stream import evaluate
from keelwright.weights.survey import with_survey

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)
MATRICES = st.tuples(st.integers(1, 8), st.integers(1, 8))
SEEDS = st.integers(0, 2**32)
KINDS = st.sampled_from(["random", "zero", "constant", "duplicates"])
CHUNKS = st.integers(1, 40)
PROJECTORS = st.sampled_from(["safe_lora", "exact_topk"])
TIES = st.sampled_from(["entry", "row", "column", "block", "head"])


class Memory:
    """Tensors in memory as a source."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def entries(self) -> Mapping[str, TensorEntry]:
        return {
            name: TensorEntry(name, STORED_NAMES[one.dtype], tuple(one.shape)) for name, one in self.tensors.items()
        }

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name].reshape(-1)[start:stop].clone()

    def describe(self) -> str:
        return "memory"


def draw(seed: int, shape: tuple[int, ...], roles: tuple[str, ...], kind: str = "random") -> dict[str, Tensor]:
    """Return one tensor per role; the last one, and with duplicates the first, of the kind asked for."""
    random = torch.Generator().manual_seed(seed)
    found = {role: torch.randn(shape, generator=random) for role in roles}
    if kind == "zero":
        found[roles[-1]] = torch.zeros(shape)
    if kind == "constant":
        found[roles[-1]] = torch.full(shape, 0.25)
    if kind == "duplicates":
        found[roles[-1]] = found[roles[0]].clone()
    return found


def run(edit: Any, given_: Mapping[str, Tensor], chunk: int = 1 << 18) -> Tensor:
    sources = {role: Memory({"w": one}) for role, one in given_.items()}
    entry = sources[edit.roles()[-1]].entries()["w"]
    edit = with_survey(edit, sources, [entry])
    parts = [values for _, values in evaluate(edit, sources, entry, chunk_elements=chunk)]
    return torch.cat(parts).view(entry.shape)


@given(SEEDS, SHAPES, KINDS, st.floats(0.0, 3.0), st.floats(0.0, 3.0))
def test_resta_is_linear_in_its_strength(
    seed: int, shape: tuple[int, ...], kind: str, one: float, other: float
) -> None:
    a, u, t = draw(seed, shape, ("aligned", "unaligned", "tuned"), kind).values()
    once = resta(a, u, t, coefficient=one + other)
    twice = resta(a, u, resta(a, u, t, coefficient=one), coefficient=other)
    assert torch.allclose(once, twice, atol=1e-5)


@given(SEEDS, SHAPES, KINDS, st.floats(0.0, 3.0), CHUNKS, st.sampled_from(["task", "safety"]))
def test_resta_d_without_dropping_is_resta_to_the_bit(
    seed: int, shape: tuple[int, ...], kind: str, strength: float, chunk: int, dare_on: Any
) -> None:
    tensors = draw(seed, shape, ("aligned", "unaligned", "tuned"), kind)
    plain = run(Resta(RestaConfig(strength)), tensors)
    assert torch.equal(run(RestaD(RestaDConfig(strength, 0.0, dare_on)), tensors, chunk), plain)


@given(SEEDS, SHAPES, KINDS, st.floats(0.0, 3.0), st.floats(0.0, 0.95), CHUNKS, st.sampled_from(["task", "safety"]))
def test_resta_d_has_the_same_bits_for_every_chunk(
    seed: int, shape: tuple[int, ...], kind: str, strength: float, rate: float, chunk: int, dare_on: Any
) -> None:
    tensors = draw(seed, shape, ("aligned", "unaligned", "tuned"), kind)
    edit = RestaD(RestaDConfig(strength, rate, dare_on, seed))
    assert torch.equal(run(edit, tensors, chunk), run(edit, tensors))


@given(SEEDS, SHAPES, st.floats(0.0, 3.0), st.floats(0.0, 0.95))
def test_resta_d_without_a_safety_vector_and_a_task_vector_is_the_aligned_model(
    seed: int, shape: tuple[int, ...], strength: float, rate: float
) -> None:
    (model,) = draw(seed, shape, ("aligned",)).values()
    tensors = dict.fromkeys(("aligned", "unaligned", "tuned"), model)
    assert torch.equal(run(RestaD(RestaDConfig(strength, rate)), tensors), model)


@given(SEEDS, MATRICES, KINDS, PROJECTORS, st.floats(-1.0, 1.0))
def test_safe_lora_either_projects_or_returns_the_tuned_matrix(
    seed: int, shape: tuple[int, int], kind: str, projector: Any, threshold: float
) -> None:
    tensors = draw(seed, shape, ("base", "aligned", "tuned"), kind)
    found = run(SafeLora(SafeLoraConfig(threshold, projector=projector)), tensors)
    inside, similarity = projected_drift(*tensors.values(), projector=projector)
    assert 0.0 - 1e-6 <= similarity <= 1.0
    if similarity <= threshold and threshold > -1.0:
        assert torch.equal(found, tensors["aligned"] + inside)
    else:
        assert torch.equal(found, tensors["tuned"])


@given(SEEDS, MATRICES, st.floats(0.05, 1.0))
def test_the_true_projector_never_lengthens_the_drift_and_is_idempotent(
    seed: int, shape: tuple[int, int], energy: float
) -> None:
    base, aligned, tuned = draw(seed, shape, ("base", "aligned", "tuned")).values()
    once, _ = projected_drift(base, aligned, tuned, projector="exact_topk", energy=energy)
    twice, _ = projected_drift(base, aligned, aligned + once, projector="exact_topk", energy=energy)
    assert float(once.norm()) <= float((tuned - aligned).norm()) * (1 + 1e-5)
    assert torch.allclose(once, twice, atol=1e-4)


@given(SEEDS, SHAPES, KINDS)
def test_tensors_that_are_no_matrices_stay_as_tuning_left_them(seed: int, shape: tuple[int, ...], kind: str) -> None:
    tensors = draw(seed, shape, ("base", "aligned", "tuned"), kind)
    if len(shape) != 2:
        for edit in (SafeLora(SafeLoraConfig(1.0)), Safemerge(SafemergeConfig(0.2, 1.0)), Lox(LoxConfig(2.0))):
            assert torch.equal(run(edit, tensors), tensors["tuned"])
        chosen = SafeLora(SafeLoraConfig(selection="number", number=3))
        assert torch.equal(run(chosen, tensors), tensors["tuned"])


@given(SEEDS, MATRICES, st.floats(0.0, 1.0), st.floats(-1.0, 1.0))
def test_safemerge_of_a_model_with_itself_stays_to_the_bit(
    seed: int, shape: tuple[int, int], coefficient: float, threshold: float
) -> None:
    base, model = draw(seed, shape, ("base", "aligned")).values()
    tensors = {"base": base, "aligned": model, "tuned": model.clone()}
    assert torch.equal(run(Safemerge(SafemergeConfig(coefficient, threshold)), tensors), model)


@given(SEEDS, MATRICES, KINDS, st.floats(0.0, 1.0))
def test_safemerge_below_every_threshold_is_linear_interpolation(
    seed: int, shape: tuple[int, int], kind: str, coefficient: float
) -> None:
    tensors = draw(seed, shape, ("base", "aligned", "tuned"), kind)
    _, similarity = projected_drift(*tensors.values())
    found = run(Safemerge(SafemergeConfig(coefficient, 1.0)), tensors)
    plain = (1.0 - coefficient) * tensors["aligned"] + coefficient * tensors["tuned"]
    assert torch.allclose(found, tensors["tuned"] if similarity >= 1.0 else plain, atol=1e-6)


@given(SEEDS, MATRICES, KINDS, st.integers(1, 9), st.floats(0.0, 2.0))
def test_lox_changes_by_at_most_its_rank_and_from_full_rank_on_by_everything(
    seed: int, shape: tuple[int, int], kind: str, rank: int, strength: float
) -> None:
    tensors = draw(seed, shape, ("base", "aligned", "tuned"), kind)
    found = run(Lox(LoxConfig(strength, rank=rank)), tensors)
    change = found.double() - tensors["tuned"].double()
    values = torch.linalg.svdvals(change)
    assert not bool((values[rank:] > 1e-5 * (1.0 + float(values[0]))).any())
    if rank >= min(shape):
        assert torch.equal(found, run(Lox(LoxConfig(strength)), tensors))


@given(SEEDS, SHAPES, KINDS, TIES, st.integers(1, 5), st.sampled_from(["mode", "sample", "mean"]), CHUNKS)
def test_somf_has_the_same_bits_for_every_chunk_and_a_mask_with_mean_one(
    seed: int, shape: tuple[int, ...], kind: str, tie: Any, size: int, export: Any, chunk: int
) -> None:
    tensors = draw(seed, shape, ("aligned", "tuned"), kind)
    count = logit_count(shape, tie, size)
    mask = Mask({"w": torch.randn(count, generator=torch.Generator().manual_seed(seed))}, {"w": shape}, tie, size)
    edit = Somf(SomfConfig(export=export, seed=seed), mask=mask)
    assert torch.equal(run(edit, tensors, chunk), run(edit, tensors))
    mean = mask.mean("w", export=export, seed=seed)
    if mean >= 1e-3:
        ones = {"aligned": torch.zeros(shape), "tuned": torch.ones(shape)}
        assert float(run(edit, ones).double().mean()) == pytest.approx(1.0, abs=1e-5)
    else:
        assert torch.equal(run(edit, tensors), tensors["aligned"])


@given(SEEDS, SHAPES, TIES)
def test_somf_with_a_full_mask_is_the_tuned_model_and_with_an_empty_one_the_aligned(
    seed: int, shape: tuple[int, ...], tie: Any
) -> None:
    tensors = draw(seed, shape, ("aligned", "tuned"))
    count = logit_count(shape, tie)
    full, empty = (Mask({"w": torch.full((count,), x)}, {"w": shape}, tie) for x in (9.0, -9.0))
    assert torch.allclose(run(Somf(mask=full), tensors), tensors["tuned"], atol=1e-6)
    assert torch.equal(run(Somf(mask=empty), tensors), tensors["aligned"])


@settings(deadline=None)
@given(SEEDS, MATRICES, KINDS, st.integers(1, 9), st.integers(1, 5), st.floats(0.0, 1.0))
def test_safe_delta_is_between_the_two_models(
    seed: int, shape: tuple[int, int], kind: str, block: int, group: int, share: float
) -> None:
    tensors = draw(seed, shape, ("aligned", "tuned"), kind)
    inputs = torch.randn(20, shape[1], generator=torch.Generator().manual_seed(seed))
    measured = LayerInputs({"w": inputs.T @ inputs / 10.0}, frozenset(), 20)
    make = lambda x, reserve: SafeDelta(  # noqa: E731
        SafeDeltaConfig(x, block_size=block, group=group, reserve=reserve), measured
    )
    assert torch.equal(run(make(0.0, 0.15), tensors), tensors["aligned"])
    assert torch.equal(run(make(1.0, 0.0), tensors), tensors["tuned"])
    again = dict.fromkeys(("aligned", "tuned"), tensors["aligned"])
    assert torch.equal(run(make(share, 0.15), again), tensors["aligned"])
