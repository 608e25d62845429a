# SPDX-License-Identifier: Apache-2.0
"""Identities of interpolation, spherical and plain, over random shapes, values, weights and chunks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from keelwright.core.errors import NumericalError
from keelwright.core.protocols import TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.karcher import Karcher, KarcherConfig, karcher
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.repair.lm_cocktail import LmCocktail, LmCocktailConfig, cocktail_weights
from keelwright.repair.model_stock import ModelStock, ModelStockConfig, model_stock
from keelwright.repair.multislerp import Multislerp, MultislerpConfig, multislerp
from keelwright.repair.nearswap import Nearswap, NearswapConfig, nearswap
from keelwright.repair.nuslerp import Nuslerp, NuslerpConfig, nuslerp
from keelwright.repair.passthrough import Passthrough, PassthroughConfig
from keelwright.repair.slerp import Slerp, SlerpConfig, slerp
from keelwright.repair.wise_ft import WiseFt, WiseFtConfig
from keelwright.weights.edit import model_roles
from keelwright.weights.stream import evaluate, reduce_tensor

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
SHAPES = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple)
SEEDS = st.integers(0, 2**32)
INSIDE = st.floats(0.001, 0.999)
WEIGHTS = st.tuples(*[st.floats(0.1, 2.0)] * 3)
KINDS = st.lists(st.sampled_from(["random", "random", "zero", "constant", "duplicate"]), min_size=4, max_size=4)
"""What each of four tensors is: the same as the first for `duplicate`."""
SCALES = st.sampled_from([1e-4, 0.5, 3.0, 1000.0])


class Memory:
    """One tensor in memory as a source."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def entries(self) -> Mapping[str, TensorEntry]:
        return {"w": entry_of(self.tensor)}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensor.reshape(-1)[start:stop].clone()

    def describe(self) -> str:
        return "memory"


def entry_of(tensor: Tensor) -> TensorEntry:
    return TensorEntry("w", STORED_NAMES[tensor.dtype], tuple(tensor.shape))


def draw(seed: int, shape: tuple[int, ...], dtype: torch.dtype, kinds: list[str]) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    tensors: list[Tensor] = []
    for number, kind in enumerate(kinds):
        fresh = torch.randn(shape, generator=random)
        if kind == "zero":
            fresh = torch.zeros(shape)
        elif kind == "constant":
            fresh = torch.full(shape, 0.5 + number)
        elif kind == "duplicate" and tensors:
            fresh = tensors[0].float()
        tensors.append(fresh.to(dtype))
    return tensors


def run(edit: Any, given: Mapping[str, Tensor], chunk: int = 1 << 18) -> Tensor:
    sources = {role: Memory(given[role]) for role in edit.roles()}
    layout = given[edit.roles()[-1]]
    parts = [values for _, values in evaluate(edit, sources, entry_of(layout), chunk_elements=chunk)]
    return torch.cat(parts).view(layout.shape)


def facts(edit: Any, given: Mapping[str, Tensor]) -> dict[str, float]:
    found = reduce_tensor(edit, {role: Memory(one) for role, one in given.items()}, entry_of(given["tuned"]))
    return edit.facts(found)  # type: ignore[no-any-return]


def roles(tensors: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("aligned", *model_roles(len(tensors) - 1)), tensors, strict=True))


def raw(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def near(one: Tensor, two: Tensor, tolerance: float = 1e-5) -> bool:
    """Compare relative to the largest number of either."""
    scale = max(float(one.double().abs().max()), float(two.double().abs().max()), 1e-300)
    return float((one.double() - two.double()).abs().max()) <= tolerance * scale


EDITS: dict[str, Any] = {
    "linear": Linear(LinearConfig(0.3)),
    "linear, three tuned": Linear(LinearConfig(weight=(0.2, 1.0, 0.7, 0.4)), models=3),
    "linear, no base": Linear(LinearConfig(weight=(1.0, 0.7, 0.4)), models=3, based=False),
    "slerp": Slerp(SlerpConfig(0.3)),
    "nuslerp": Nuslerp(NuslerpConfig((1.0, 2.0))),
    "nuslerp by last axis": Nuslerp(NuslerpConfig((1.0, 2.0), flatten=False)),
    "nuslerp by first axis": Nuslerp(NuslerpConfig((1.0, 2.0), flatten=False, row_wise=True)),
    "nuslerp on a base": Nuslerp(NuslerpConfig((1.0, 2.0)), based=True),
    "nuslerp on a base by last axis": Nuslerp(NuslerpConfig((1.0, 2.0), flatten=False), based=True),
    "nuslerp on a base by first axis": Nuslerp(NuslerpConfig((1.0, 2.0), flatten=False, row_wise=True), based=True),
    "multislerp": Multislerp(MultislerpConfig((1.0, 2.0, 0.7)), models=3),
    "multislerp on a base": Multislerp(MultislerpConfig((1.0, 2.0, 0.7)), models=3, based=True),
    "karcher": Karcher(KarcherConfig((1.0, 2.0, 0.7)), models=3),
    "nearswap": Nearswap(NearswapConfig(0.2)),
    "model_stock": ModelStock(models=3),
    "model_stock by rows": ModelStock(ModelStockConfig(filter_wise=True), models=3),
    "wise_ft": WiseFt(WiseFtConfig(0.4)),
    "lm_cocktail": LmCocktail(LmCocktailConfig(losses=(1.0, 2.0, 1.5, 0.7)), models=3),
    "passthrough": Passthrough(PassthroughConfig(-1.5)),
}
EVERY = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
NAMES_THAT_KEEP = [name for name in EDITS if name != "passthrough"]
KEEPS_A_MODEL = pytest.mark.parametrize("edit", [EDITS[name] for name in NAMES_THAT_KEEP], ids=NAMES_THAT_KEEP)


@EVERY
@given(SEEDS, SHAPES, DTYPES, KINDS, st.integers(1, 60))
def test_the_bits_do_not_depend_on_the_chunks_and_every_number_is_finite(
    edit: Any, seed: int, shape: tuple[int, ...], dtype: Any, kinds: list[str], chunk: int
) -> None:
    models = roles(draw(seed, shape, dtype, kinds))
    whole = run(edit, models)
    assert bool(torch.isfinite(whole).all()) and whole.dtype is dtype
    assert raw(run(edit, models, chunk)) == raw(whole)


@KEEPS_A_MODEL
@given(SEEDS, SHAPES, DTYPES)
def test_a_model_merged_with_itself_stays_to_the_bit(edit: Any, seed: int, shape: tuple[int, ...], dtype: Any) -> None:
    (model,) = draw(seed, shape, dtype, ["random"])
    assert raw(run(edit, roles([model] * 4), 5)) == raw(model)


@EVERY
@given(SEEDS, SHAPES, KINDS)
def test_the_inputs_are_left_alone(edit: Any, seed: int, shape: tuple[int, ...], kinds: list[str]) -> None:
    models = roles(draw(seed, shape, torch.float32, kinds))
    before = {role: raw(one) for role, one in models.items()}
    run(edit, models)
    assert {role: raw(one) for role, one in models.items()} == before


@given(SEEDS, SHAPES, WEIGHTS, st.permutations(range(3)))
def test_the_order_of_the_models_does_not_matter_where_their_weights_move_with_them(
    seed: int, shape: tuple[int, ...], weights: tuple[float, ...], order: list[int]
) -> None:
    base, *models = draw(seed, shape, torch.float32, ["random"] * 4)
    turned, share = [models[one] for one in order], tuple(weights[one] for one in order)
    for kind, config in ((Linear, LinearConfig), (Multislerp, MultislerpConfig), (Karcher, KarcherConfig)):
        settings = {} if kind is Karcher else {"based": False}
        here = kind(config(weight=weights), models=3, **settings)  # type: ignore[operator]
        there = kind(config(weight=share), models=3, **settings)  # type: ignore[operator]
        given_here, given_there = roles([base, *models]), roles([base, *turned])
        if kind is Multislerp:
            assume(facts(here, given_here)["agreement"] > 1e-3)
        if kind is Karcher:
            assume(facts(here, given_here)["unsettled"] == facts(there, given_there)["unsettled"] == 0.0)
        assert near(run(here, given_here), run(there, given_there), 1e-4)
    assert near(model_stock(base, models), model_stock(base, turned))


@given(SEEDS, SHAPES, WEIGHTS, SCALES)
def test_scaling_every_model_scales_the_result(
    seed: int, shape: tuple[int, ...], weights: tuple[float, ...], scale: float
) -> None:
    base, *models = draw(seed, shape, torch.float64, ["random"] * 4)
    larger = [scale * one for one in models]
    try:
        directions = multislerp(models, weights), multislerp(larger, weights)
    except NumericalError:
        assume(False)
    assert near(scale * directions[0], directions[1])
    assert near(scale * karcher(models, weights), karcher(larger, weights))
    assert near(scale * slerp(base, models[0], coefficient=0.4), slerp(scale * base, larger[0], coefficient=0.4))
    pair, wide = (models[0], models[1]), (larger[0], larger[1])
    for flatten, row_wise in ((True, False), (False, False), (False, True)):
        small = nuslerp(pair, (1.0, 2.0), flatten=flatten, row_wise=row_wise)
        assert near(scale * small, nuslerp(wide, (1.0, 2.0), flatten=flatten, row_wise=row_wise))
    stocked = model_stock(scale * base, larger)
    assert near(scale * model_stock(base, models), stocked)


@given(SEEDS, SHAPES, DTYPES)
def test_the_ends_of_slerp_return_an_input_byte_for_byte(seed: int, shape: tuple[int, ...], dtype: Any) -> None:
    models = roles(draw(seed, shape, dtype, ["random"] * 2))
    assert raw(run(Slerp(SlerpConfig(0.0)), models, 3)) == raw(models["aligned"])
    assert raw(run(Slerp(SlerpConfig(1.0)), models, 3)) == raw(models["tuned"])


@given(SEEDS, SHAPES, st.floats(-0.5, 1.5))
def test_swapping_the_models_and_the_place_changes_nothing(seed: int, shape: tuple[int, ...], t: float) -> None:
    one, two = draw(seed, shape, torch.float64, ["random"] * 2)
    assert near(slerp(one, two, coefficient=t), slerp(two, one, coefficient=1.0 - t), 1e-9)
    assert near(nuslerp((one, two), (1.0 - t, t)), nuslerp((two, one), (t, 1.0 - t)), 1e-5)


@given(SEEDS, st.integers(2, 40), INSIDE)
def test_models_of_one_norm_keep_it_on_the_arc(seed: int, size: int, t: float) -> None:
    one, two = (tensor / tensor.norm() for tensor in draw(seed, (size,), torch.float64, ["random"] * 2))
    cosine = float(one @ two)
    assume(abs(cosine) < 0.9995)
    assert float(slerp(one, two, coefficient=t).norm()) == pytest.approx(1.0, abs=1e-9)
    assert float(nuslerp((one, two), (1.0 - t, t)).norm()) == pytest.approx(1.0, abs=1e-9)
    # Several models: the mean norm, here 1.
    for found in (multislerp((one, two), (1.0 - t, t)), karcher((one, two), (1.0 - t, t))):
        assert float(found.norm()) == pytest.approx(1.0, abs=1e-9)
    # The angle is shared out: the Karcher mean of two is the point on the arc.
    assert near(karcher((one, two), (1.0 - t, t)), slerp(one, two, coefficient=t), 1e-4)


@given(SEEDS, SHAPES, INSIDE, st.floats(0.01, 100.0))
def test_slerp_of_a_multiple_is_linear(seed: int, shape: tuple[int, ...], t: float, factor: float) -> None:
    (one,) = draw(seed, shape, torch.float64, ["random"])
    assert near(slerp(one, factor * one, coefficient=t), (1.0 - t + t * factor) * one, 1e-12)


@given(SEEDS, SHAPES, st.floats(0.0, 3.0))
def test_nearswap_moves_no_weight_further_than_its_bound_and_takes_all_that_are_near(
    seed: int, shape: tuple[int, ...], t: float
) -> None:
    base, other = draw(seed, shape, torch.float64, ["random"] * 2)
    found = nearswap(base, other, t=t)
    assert bool(((found - base).abs() <= t * (1 + 1e-12) + 1e-15).all())
    is_near = (other - base).abs() <= t
    assert torch.equal(found[is_near], other[is_near])
    # Odd in the difference.
    assert near(found - base, base - nearswap(base, 2 * base - other, t=t), 1e-9)
    assert torch.equal(nearswap(base, other, t=float((other - base).abs().max())), other)


@given(SEEDS, SHAPES, SCALES)
def test_model_stock_keeps_its_ratio_when_every_task_vector_is_scaled(
    seed: int, shape: tuple[int, ...], scale: float
) -> None:
    base, *models = draw(seed, shape, torch.float64, ["random"] * 4)
    larger = [base + scale * (one - base) for one in models]
    for filter_wise in (False, True):
        here = model_stock(base, models, filter_wise=filter_wise, clip=True) - base
        there = model_stock(base, larger, filter_wise=filter_wise, clip=True) - base
        # The differences themselves are rounded to the size of the base.
        assert float((scale * here - there).abs().max()) <= 1e-9 * max(1.0, scale)


@given(st.lists(st.floats(0.0, 50.0), min_size=1, max_size=6), st.floats(0.05, 20.0), st.floats(-5.0, 5.0))
def test_cocktail_weights_sum_to_one_favour_the_best_and_ignore_a_constant(
    losses: list[float], temperature: float, constant: float
) -> None:
    weights = cocktail_weights(losses, temperature=temperature)
    assert math.fsum(weights) == pytest.approx(1.0, abs=1e-12)
    assert weights[losses.index(min(losses))] == max(weights)
    shifted = cocktail_weights([loss + constant for loss in losses], temperature=temperature)
    assert shifted == pytest.approx(weights, abs=1e-9)


@given(SEEDS, SHAPES, WEIGHTS, DTYPES)
def test_a_combination_says_what_the_edit_computes(
    seed: int, shape: tuple[int, ...], weights: tuple[float, ...], dtype: Any
) -> None:
    models = roles(draw(seed, shape, torch.float32, ["random"] * 3))
    share = tuple(weight / math.fsum(weights) for weight in weights)
    for edit in (
        Linear(LinearConfig(weight=weights), models=2),
        Linear(LinearConfig(weight=weights, normalize=False), models=2),
        LmCocktail(LmCocktailConfig(weight=share), models=2),
        LmCocktail(LmCocktailConfig(losses=weights), models=2),
    ):
        wanted = sum(weight * models[role].double() for role, weight in edit.combination().items())
        assert isinstance(wanted, Tensor)
        assert torch.allclose(run(edit, models, 7).double(), wanted, rtol=0, atol=1e-5)
