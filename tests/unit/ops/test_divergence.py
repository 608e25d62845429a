# SPDX-License-Identifier: Apache-2.0
"""KL divergence in chunks, against the plain formula and autograd."""

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.ops.divergence import divergence


def plain(logits, reference, direction):
    ours, theirs = logits.log_softmax(-1), reference.log_softmax(-1)
    first, second = (theirs, ours) if direction == "forward" else (ours, theirs)
    return (first.exp() * (first - second)).sum(-1)


def pair(vocab=23, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    return [3 * torch.randn(5, vocab, generator=rng, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize(("direction", "expected"), [("forward", 0.143841), ("reverse", 0.130812)])
def test_known_answer_of_both_directions(direction, expected):
    reference, ours = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert float(divergence(ours, reference, direction=direction)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
def test_chunks_give_the_plain_value_and_gradient(direction, chunk):
    logits, reference = pair()
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    results = []
    for function in (plain, lambda *given: divergence(given[0], given[1], direction=given[2], chunk=chunk)):
        leaf = logits.clone().requires_grad_()
        value = function(leaf, reference, direction)
        results.append((value.detach(), torch.autograd.grad((weights * value).sum(), leaf)[0]))
    (value, gradient), (ours, our_gradient) = results
    assert torch.allclose(ours, value, atol=1e-12)
    assert torch.allclose(our_gradient, gradient, atol=1e-12)


def test_forward_gradient_is_the_difference_of_probabilities():
    logits, reference = pair()
    leaf = logits.clone().requires_grad_()
    gradient = torch.autograd.grad(divergence(leaf, reference).sum(), leaf)[0]
    assert torch.allclose(gradient, logits.softmax(-1) - reference.softmax(-1), atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_equal_logits_have_no_divergence_and_no_gradient(direction):
    leaf = pair(dtype=torch.float32)[0].requires_grad_()
    value = divergence(leaf, leaf.detach(), direction=direction, chunk=7)
    assert value.tolist() == [0.0] * 5
    assert not torch.autograd.grad(value.sum(), leaf)[0].any()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergence_is_never_negative(direction):
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(200, 50, generator=rng)
    assert (
        float(divergence(logits + 1e-4 * torch.randn(200, 50, generator=rng), logits, direction=direction).min()) >= 0
    )


def test_directions_differ():
    logits, reference = pair()
    forward, reverse = (divergence(logits, reference, direction=direction) for direction in ("forward", "reverse"))
    assert not torch.allclose(forward, reverse)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_tokens_that_cannot_occur_take_no_part(direction):
    logits, reference = pair(vocab=6)
    wide = [torch.cat([one, torch.full((5, 2), float("-inf"), dtype=one.dtype)], -1) for one in (logits, reference)]
    leaf = wide[0].requires_grad_()
    value = divergence(leaf, wide[1], direction=direction, chunk=4)
    assert torch.allclose(value, plain(logits, reference, direction), atol=1e-12)
    gradient = torch.autograd.grad(value.sum(), leaf)[0]
    assert torch.isfinite(gradient).all() and not gradient[:, 6:].any()


def test_half_precision_logits_are_widened_first():
    logits, reference = (one.bfloat16() for one in pair(dtype=torch.float32))
    leaf = logits.clone().requires_grad_()
    value = divergence(leaf, reference)
    assert value.dtype == torch.float32
    assert torch.allclose(value, plain(logits.float(), reference.float(), "forward"), atol=1e-5)
    assert torch.autograd.grad(value.sum(), leaf)[0].dtype == torch.bfloat16


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="chunk"):
        divergence(*pair(), chunk=0)
