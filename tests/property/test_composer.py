# SPDX-License-Identifier: Apache-2.0
"""Identities of composed gradients, on bowls of random shape."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from keelwright.ops.gradients import Gradient, add_scaled, dot, scaled, squared_norm
from keelwright.training.composer import GradientComposer
from keelwright.training.feeds import EncodedFeed, Feeds
from keelwright.training.processes import Replicated
from keelwright.training.rows import Batch, EncodedRow
from keelwright.training.terms import Objective, Term, WeightShift

SEEDS = st.integers(0, 10**6)
SIZES = st.integers(1, 6)
ALONE = Replicated(Accelerator(device_placement=False))


class Bowl(nn.Module):
    """`h = x'Ax / 2` in float64, with x in two tensors."""

    def __init__(self, seed: int, size: int) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        root = torch.randn(size + 1, size + 1, generator=source, dtype=torch.float64)
        self.curve = root @ root.T + 0.1 * torch.eye(size + 1, dtype=torch.float64)
        start = torch.randn(size + 1, generator=source, dtype=torch.float64) + 0.1
        self.first = nn.Parameter(start[:1].clone())
        self.rest = nn.Parameter(start[1:].clone())

    @property
    def x(self) -> Tensor:
        return torch.cat([self.first, self.rest])


def height(model: Bowl, batch: Batch) -> Tensor:
    return len(batch.rows) * 0.5 * model.x @ model.curve @ model.x


def composer_of(model: nn.Module, parts: int = 1) -> GradientComposer:
    feed = EncodedFeed([EncodedRow(torch.arange(1, 4), 2)] * 4, 4, seed=0)
    feeds = Feeds({"user": feed, "harmful": feed}, pad_id=0, device=torch.device("cpu"), accumulate=parts)
    return GradientComposer(model, dict(model.named_parameters()), feeds, ALONE)


def flat(gradient: Gradient) -> Tensor:
    return torch.cat([one.flatten() for one in gradient if one is not None])


class Listed(Objective):
    def __init__(self, *terms: Term) -> None:
        super().__init__()
        self.listed = terms

    def terms(self, step: int) -> tuple[Term, ...]:
        return self.listed


def _term(weight: float = 1.0, size: float | None = None, **settings: object) -> Term:
    shift = None if size is None else WeightShift(size, eps=0.0, **settings)
    return Term(f"{weight} at {size}", "harmful", weight=weight, loss=height, at=shift)


@settings(deadline=None, max_examples=50)
@given(SEEDS, SIZES, st.floats(0.001, 0.5), st.floats(0.1, 20.0), st.sampled_from([1, 2, 4]))
def test_boosters_difference_is_alpha_times_the_curve_along_the_slope(
    seed: int, size: int, alpha: float, lambda_: float, parts: int
) -> None:
    model = Bowl(seed, size)
    found = composer_of(model, parts).compose(Listed(_term(lambda_), _term(-lambda_, -alpha)), 0)
    slope = (model.curve @ model.x).detach()
    expected = lambda_ * alpha * model.curve @ (slope / slope.norm())
    torch.testing.assert_close(flat(found.gradient), expected, rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=50)
@given(SEEDS, SIZES, st.floats(0.001, 0.5))
def test_sam_climbs_and_its_gradient_is_that_of_the_moved_bowl(seed: int, size: int, rho: float) -> None:
    model = Bowl(seed, size)
    composer = composer_of(model)
    found = composer.take(_term(size=rho))
    slope = (model.curve @ model.x).detach()
    # The norm is float32: the moved place is off by 1e-7 of the step, and entries that cancel show it.
    expected = slope + rho * model.curve @ (slope / slope.norm())
    torch.testing.assert_close(flat(found.gradient), expected, rtol=1e-5, atol=1e-6)
    assert float(found.value) >= float(composer.take(_term()).value)


@settings(deadline=None, max_examples=30)
@given(SEEDS, SIZES, st.floats(1e-3, 1e3))
def test_a_step_beside_the_weights_does_not_know_the_scale_of_the_loss(seed: int, size: int, scale: float) -> None:
    composer = composer_of(Bowl(seed, size))
    one = composer.take(_term(size=-0.2))
    many = composer.take(
        Term("h", "harmful", loss=lambda model, batch: scale * height(model, batch), at=WeightShift(-0.2, eps=0.0))
    )
    # As above, times the scale.
    torch.testing.assert_close(flat(many.gradient), scale * flat(one.gradient), rtol=1e-5, atol=1e-6 * scale)


@settings(deadline=None, max_examples=30)
@given(SEEDS, SIZES, st.floats(0.01, 3.0), st.floats(0.1, 10.0))
def test_where_all_weights_are_of_one_size_the_adaptive_step_is_that_size_times_the_plain_one(
    seed: int, size: int, rho: float, weight: float
) -> None:
    model = Bowl(seed, size)
    with torch.no_grad():
        for one in model.parameters():
            one.copy_(one.sign() * weight)
    composer = composer_of(model)
    along = composer.gradient(height, "harmful").gradient
    plain = WeightShift(rho, eps=0.0).step(composer, along)
    adaptive = WeightShift(rho, eps=0.0, adaptive=True).step(composer, along)
    torch.testing.assert_close(flat(adaptive), weight * flat(plain), rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(SEEDS, SIZES, st.floats(-3.0, 3.0).filter(lambda size: abs(size) > 1e-3))
def test_a_step_has_its_length_and_lies_along_the_gradient(seed: int, size: int, length: float) -> None:
    composer = composer_of(Bowl(seed, size))
    along = composer.gradient(height, "harmful").gradient
    step = WeightShift(length, eps=0.0).step(composer, along)
    norm = float(squared_norm(along)) ** 0.5
    assert abs(float(squared_norm(step)) ** 0.5 - abs(length)) < 1e-5 * abs(length)
    assert abs(float(dot(along, step)) - length * norm) < 1e-4 * abs(length) * norm


@settings(deadline=None, max_examples=30)
@given(SEEDS, SIZES, st.lists(st.floats(-5.0, 5.0), min_size=1, max_size=4))
def test_a_composed_gradient_is_linear_in_the_weights_of_its_terms(seed: int, size: int, factors: list[float]) -> None:
    composer = composer_of(Bowl(seed, size))
    terms = [
        Term(str(place), "user", weight=factor or 1.0, loss=height, at=WeightShift(0.1 * place) if place else None)
        for place, factor in enumerate(factors)
    ]
    expected: Gradient = [None, None]
    for term in terms:
        expected = add_scaled(expected, scaled(composer.take(term).gradient, term.weight))
    found = composer.compose(Listed(*terms), 0)
    torch.testing.assert_close(flat(found.gradient), flat(expected), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(SEEDS, SIZES, st.floats(-2.0, 2.0), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_weights_have_their_bits_back_whatever_the_step(
    seed: int, size: int, length: float, dtype: torch.dtype
) -> None:
    model = Bowl(seed, size).to(dtype)
    model.curve = model.curve.to(dtype)
    before = [one.detach().clone() for one in model.parameters()]
    for adaptive in (False, True):
        composer_of(model, 2).take(_term(size=length, adaptive=adaptive))
        assert all(torch.equal(one, kept) for one, kept in zip(model.parameters(), before, strict=True))
