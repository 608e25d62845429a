# SPDX-License-Identifier: Apache-2.0
"""Kullback-Leibler divergence of next-token distributions, in chunks of the vocabulary, with its gradient by hand.

    forward   KL(p_0 || p_w) = sum_v p_0(v) (log p_0(v) - log p_w(v))      gradient per logit:  p_w - p_0
    reverse   KL(p_w || p_0) = sum_v p_w(v) (log p_w(v) - log p_0(v))      gradient per logit:  p_w (log p_w/p_0 - KL)

p_0 is the reference, p_w the model that is trained. Autograd would keep several float32 copies of the logits for the
backward pass; here the logits as they came are kept, and two numbers per position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_in_range

Direction = Literal["forward", "reverse"]
"""forward: KL(p_0 || p_w), a supervised target that covers the reference; reverse: KL(p_w || p_0)."""

CHUNK: Final = 16_384
"""Entries of the vocabulary that are widened to float32 at a time."""


def divergence(
    logits: Float[Tensor, "positions vocab"],
    reference: Float[Tensor, "positions vocab"],
    *,
    direction: Direction = "forward",
    chunk: int = CHUNK,
) -> Float[Tensor, " positions"]:
    """Return the KL divergence at each position, in nats, 0 or more; differentiable in `logits` once.

    Args:
        logits: Of the model that is trained; need not be normalised.
        reference: Of the reference; no gradient flows into it.
        direction: Which distribution the mean is taken over.
        chunk: Entries of the vocabulary at a time; the result does not depend on it but for rounding.

    Returns:
        Evaluated in float32, or in float64 where `logits` is.
    """
    require_in_range("chunk", chunk, low=1)
    found: Tensor = _Divergence.apply(logits, reference.detach(), direction == "forward", chunk)
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor, forward: bool, chunk: int) -> Tensor:
        norm, reference_norm = (_log_sum_exp(one, chunk) for one in (logits, reference))
        total = torch.zeros_like(norm)
        for ours, theirs in _logprobs(logits, reference, norm, reference_norm, chunk):
            first, second = (theirs, ours) if forward else (ours, theirs)
            total += _expected(first, first - second).sum(-1)
        # Rounding alone can make it negative.
        total.clamp_(min=0.0)
        ctx.save_for_backward(logits, reference, norm, reference_norm, total)
        ctx.by, ctx.chunk = forward, chunk
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, reference, norm, reference_norm, total = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        start = 0
        for ours, theirs in _logprobs(logits, reference, norm, reference_norm, ctx.chunk):
            part = ours.exp() - theirs.exp() if ctx.by else _expected(ours, ours - theirs - total[:, None])
            gradient[:, start : start + ours.shape[1]] = (part * upstream[0][:, None]).to(logits.dtype)
            start += ours.shape[1]
        return gradient, None, None, None


def _expected(logprobs: Tensor, values: Tensor) -> Tensor:
    """Return `p * values`, and 0 where p is 0: a token that cannot occur has no part in the mean."""
    weights = logprobs.exp()
    return torch.where(weights > 0, weights * values, 0.0)


def _log_sum_exp(logits: Tensor, chunk: int) -> Tensor:
    parts = [torch.logsumexp(_wide(part), dim=-1) for part in logits.split(chunk, dim=-1)]
    return torch.stack(parts).logsumexp(0)


def _logprobs(
    logits: Tensor, reference: Tensor, norm: Tensor, reference_norm: Tensor, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both log-probabilities of one chunk of the vocabulary after another."""
    for ours, theirs in zip(logits.split(chunk, dim=-1), reference.split(chunk, dim=-1), strict=True):
        yield _wide(ours) - norm[:, None], _wide(theirs) - reference_norm[:, None]


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
