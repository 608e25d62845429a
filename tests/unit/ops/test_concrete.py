# SPDX-License-Identifier: Apache-2.0
"""Concrete masks: known answers, their distribution, and who shares a logit."""

import math

import pytest
import torch

from keelwright.ops.concrete import concrete, harden, logit_count, logit_index, rescaled, spread
from keelwright.ops.philox import uniforms

TIES = ("entry", "row", "column", "block", "head")
SHAPES = ((7,), (4, 6), (5, 3), (2, 3, 5), (1, 1))


def draws(n, seed=0):
    return uniforms((seed, 3), 0, n)


def test_the_middle_is_one_half():
    half = torch.tensor([0.5])
    assert concrete(torch.zeros(1), half, temperature=0.5).item() == 0.5
    assert rescaled(torch.tensor([0.5])).item() == 1.0


@pytest.mark.parametrize("x", [-2.0, 0.3, 1.0])
@pytest.mark.parametrize("u", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_known_answers_of_the_published_formula(x, u, temperature):
    expected = 1.0 / (1.0 + math.exp(-(math.log(u / (1.0 - u)) + x) / temperature))
    found = concrete(torch.tensor([x]), torch.tensor([u]), temperature=temperature)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("x", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_the_chance_of_more_than_a_half_is_the_sigmoid_at_every_temperature(x, temperature):
    n = 40_000
    share = float((concrete(torch.full((n,), x), draws(n), temperature=temperature) > 0.5).double().mean())
    p = 1.0 / (1.0 + math.exp(-x))
    assert abs(share - p) <= 3.0 * math.sqrt(p * (1.0 - p) / n)


def test_the_mean_is_not_the_sigmoid_but_at_zero():
    n = 200_000
    means = {x: float(concrete(torch.full((n,), x), draws(n), temperature=0.5).double().mean()) for x in (0.0, 1.0)}
    assert means[0.0] == pytest.approx(0.5, abs=0.003)
    assert means[1.0] == pytest.approx(0.703, abs=0.003)


def test_a_small_temperature_gives_bits():
    found = concrete(torch.zeros(1000), draws(1000), temperature=1e-4)
    assert float(torch.minimum(found, 1.0 - found).max()) < 0.2
    assert float(torch.minimum(found, 1.0 - found).mean()) < 1e-3


def test_the_ends_of_the_uniform_numbers_are_finite():
    found = concrete(torch.zeros(2), torch.tensor([0.0, 1.0]), temperature=0.5)
    assert bool(torch.isfinite(found).all()) and 0.0 < found[0] < 0.01 and 0.99 < found[1] < 1.0 + 1e-7


def test_straight_through_bits_have_the_gradient_of_the_mask():
    logits = torch.tensor([0.2, -0.4], requires_grad=True)
    soft = concrete(logits, torch.tensor([0.5, 0.5]), temperature=0.5)
    (wanted,) = torch.autograd.grad(soft.sum(), logits, retain_graph=True)
    hard = harden(soft)
    assert hard.tolist() == [1.0, 0.0]
    assert torch.equal(torch.autograd.grad(hard.sum(), logits)[0], wanted)


def test_rescaling_gives_a_mean_of_one_and_drops_an_empty_mask():
    mask = torch.tensor([1.0, 0.0, 0.5, 0.5])
    assert rescaled(mask).mean().item() == pytest.approx(1.0)
    assert not rescaled(torch.full((4,), 1e-4)).any()


@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [2, 4, 64])
def test_spreading_and_indexing_agree(tie, shape, size):
    count = logit_count(shape, tie, size)
    values = torch.arange(float(count))
    whole = spread(values, shape, tie, size)
    elements = math.prod(shape)
    assert whole.shape == shape and set(whole.flatten().tolist()) == set(values.tolist())
    parts = [logit_index(shape, tie, start, min(start + 3, elements), size) for start in range(0, elements, 3)]
    assert torch.equal(values[torch.cat(parts)], whole.flatten())


def test_ties_by_hand():
    two = (2, 3)
    assert [logit_count(two, tie, 2) for tie in TIES] == [6, 2, 3, 4, 1]
    assert spread(torch.arange(2.0), two, "row").tolist() == [[0, 0, 0], [1, 1, 1]]
    assert spread(torch.arange(4.0), two, "block", 2).tolist() == [[0, 0, 1], [2, 2, 3]]
