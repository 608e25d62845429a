# SPDX-License-Identifier: Apache-2.0
"""Gradient surgery: what is cut, what is left, and when."""

import pytest
import torch

from keelwright.ops.gradients import dot
from keelwright.ops.surgery import without_conflict


def gradient(*parts):
    return [None if one is None else torch.tensor(one) for one in parts]


def random_pair(seed):
    rng = torch.Generator().manual_seed(seed)
    return [[torch.randn(4, 3, generator=rng), torch.randn(7, generator=rng)] for _ in range(2)]


def test_known_answer():
    cut = without_conflict(gradient([1.0, 2.0]), gradient([0.0, -1.0]))
    assert cut.gradient[0].tolist() == [1.0, 0.0]
    assert cut.conflicts == 1.0
    assert cut.cosine == pytest.approx(-2 / 5**0.5)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_nothing_against_alignment_is_left(seed, scope):
    user, alignment = random_pair(seed)
    cut = without_conflict(user, alignment, scope=scope)
    assert float(dot(cut.gradient, alignment)) >= -1e-5
    if scope == "tensor":
        assert all(float((one * two).sum()) >= -1e-5 for one, two in zip(cut.gradient, alignment, strict=True))


def test_without_conflict_the_same_tensors_come_back():
    user, alignment = gradient([1.0, 2.0], [3.0]), gradient([1.0, 0.0], [1.0])
    for scope in ("global", "tensor"):
        cut = without_conflict(user, alignment, scope=scope)
        assert all(one is two for one, two in zip(cut.gradient, user, strict=True))
        assert cut.conflicts == 0.0


def test_a_gradient_straight_against_alignment_vanishes():
    alignment = random_pair(0)[0]
    cut = without_conflict([-2.5 * one for one in alignment], alignment)
    assert max(float(one.abs().max()) for one in cut.gradient) < 1e-6


@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_length_of_the_alignment_gradient_does_not_matter(scale):
    alignment = random_pair(2)[0]
    user = [one - 2 * two for one, two in zip(random_pair(3)[0], alignment, strict=True)]
    first = without_conflict(user, alignment)
    second = without_conflict(user, [scale * one for one in alignment])
    assert first.conflicts == second.conflicts == 1.0
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(first.gradient, second.gradient, strict=True))


def test_one_test_on_all_weights_is_not_one_test_per_weight():
    user, alignment = gradient([1.0, 0.0], [3.0]), gradient([-1.0, 1.0], [1.0])
    together = without_conflict(user, alignment)
    apart = without_conflict(user, alignment, scope="tensor")
    assert together.conflicts == 0.0 and together.gradient[0].tolist() == [1.0, 0.0]
    assert apart.conflicts == 0.5 and apart.gradient[0].tolist() == [0.5, 0.5]
    assert apart.gradient[1].tolist() == [3.0]


def test_an_alignment_gradient_of_rounding_size_is_no_direction():
    user, alignment = gradient([1.0, 2.0]), gradient([0.0, -1e-8])
    assert without_conflict(user, alignment).conflicts == 0.0
    assert without_conflict(user, alignment, floor=1e-9).conflicts == 1.0
    assert without_conflict(user, gradient([0.0, 0.0])).gradient[0].tolist() == [1.0, 2.0]


def test_weights_without_a_gradient_count_as_zero():
    cut = without_conflict(gradient(None, [1.0, 2.0], [1.0]), gradient([5.0], [0.0, -1.0], None))
    # What alignment wants of a weight that the user's loss does not touch is taken along with the rest.
    square = 25.0 + 1.0
    assert cut.gradient[0].tolist() == pytest.approx([2.0 / square * 5.0])
    assert cut.gradient[1].tolist() == pytest.approx([1.0, 2.0 - 2.0 / square])
    assert cut.gradient[2].tolist() == [1.0]
    assert float(dot(cut.gradient, gradient([5.0], [0.0, -1.0], None))) == pytest.approx(0.0, abs=1e-6)
    assert without_conflict([None], [None]).cosine == 0.0
