# SPDX-License-Identifier: Apache-2.0
"""The direction of refusal: found by a difference of means, chosen by rules, taken out of weights.

    r(pos, l) = mean_harmful h(pos, l) - mean_harmless h(pos, l)          h at the input of block l
    s = log P_ref - log(1 - P_ref)                                        P_ref: probability of the refusals' openings
    W' = W - b v (v^T W),   E' = E - b (E v) v^T,   bias' = bias - b v (v . bias)      v = r / ||r||

Source:
    Arditi et al.: Refusal in Language Models Is Mediated by a Single Direction, arXiv 2406.11717, sections 2.3 and 4;
    official code: andyrdt/refusal_direction (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

EPS = 1e-8
"""Added to both probabilities of the score; the official code's."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One direction, and what taking it out and putting it in does."""

    position: int
    """Token position, counted from the end of the prompt: -1 is the last."""
    layer: int
    """Block at whose input it was found, from 0."""
    ablated: float
    """Mean refusal score of harmful prompts without the direction, in log-odds; lower: refuses less."""
    induced: float
    """Mean refusal score of harmless prompts with the direction added at its layer; higher: refuses more."""
    divergence: float
    """Mean KL(original || without the direction) at the last position of harmless prompts, in nats."""


def difference_of_means(
    harmful: Float[Tensor, "prompts positions layers d_model"],
    harmless: Float[Tensor, "others positions layers d_model"],
) -> Float[Tensor, "positions layers d_model"]:
    """Return the difference of the two classes' mean activations, in float64."""
    return harmful.double().mean(0) - harmless.double().mean(0)


def unit(direction: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """Return the direction at length 1, in float64; NaN where it has none."""
    wide = direction.double()
    length = wide.norm()
    return wide / length if float(length) > 0.0 else torch.full_like(wide, math.nan)


def refusal_score(
    logits: Float[Tensor, "prompts vocab"], openings: Int[Tensor, " tokens"], *, eps: float = EPS
) -> Float[Tensor, " prompts"]:
    """Return the log-odds that the next token opens a refusal, in float64.

    >>> logits = torch.tensor([[0.8, 0.2]]).log()
    >>> round(float(refusal_score(logits, torch.tensor([0]))), 4)
    1.3863

    Args:
        logits: Of the first answer token.
        openings: Different first tokens of refusals.
        eps: Added to both probabilities.
    """
    refused = torch.softmax(logits.double(), dim=-1)[:, openings].sum(-1)
    return torch.log(refused + eps) - torch.log(1.0 - refused + eps)


def divergence(
    original: Float[Tensor, "prompts vocab"], changed: Float[Tensor, "prompts vocab"]
) -> Float[Tensor, " prompts"]:
    """Return KL(original || changed) of the next token, in nats; evaluated in float64."""
    p, q = (torch.log_softmax(one.double(), dim=-1) for one in (original, changed))
    return (p.exp() * (p - q)).sum(-1)


def admissible(
    candidate: Candidate, *, layers: int, deepest: float, most_divergence: float, least_induced: float
) -> bool:
    """Say whether a direction passes the rules of the source.

    Args:
        candidate: The direction.
        layers: Blocks of the model.
        deepest: Share of the depth from which on layers are too close to the output; the source: 0.8.
        most_divergence: Largest KL on harmless prompts, in nats; the source: 0.1.
        least_induced: Smallest refusal score that adding it gives harmless prompts; the source: 0.
    """
    figures = (candidate.ablated, candidate.induced, candidate.divergence)
    return (
        all(math.isfinite(one) for one in figures)
        and candidate.layer < int(deepest * layers)
        and candidate.divergence <= most_divergence
        and candidate.induced >= least_induced
    )


def select(
    candidates: Sequence[Candidate],
    *,
    layers: int,
    deepest: float = 0.8,
    most_divergence: float = 0.1,
    least_induced: float = 0.0,
) -> Candidate | None:
    """Return the admissible direction without which harmful prompts are refused least, or None."""
    rules = {"deepest": deepest, "most_divergence": most_divergence, "least_induced": least_induced}
    fit = [one for one in candidates if admissible(one, layers=layers, **rules)]
    return min(fit, key=lambda one: one.ablated, default=None)


def without_direction(
    written: Float[Tensor, " d_model *rest"], direction: Float[Tensor, " d_model"], *, strength: float = 1.0
) -> Float[Tensor, " d_model *rest"]:
    """Return what writes into the residual stream, without what it writes along a direction.

    Evaluated in float32 (float64 for float64) and rounded once.

    >>> v = torch.tensor([0.6, 0.8])
    >>> without_direction(torch.tensor([[3.0, 4.0], [1.0, 2.0]]), v)
    tensor([[ 1.4400,  1.6000],
            [-1.0800, -1.2000]])

    Args:
        written: A matrix `[d_model, d_in]`, or a bias `[d_model]`.
        direction: Of length 1.
        strength: b, 0 to 1; 0 returns the argument.
    """
    if strength == 0.0:
        return written
    wide = written.to(torch.promote_types(written.dtype, torch.float32))
    v = direction.to(device=wide.device, dtype=wide.dtype)
    along = torch.tensordot(v, wide, dims=1)
    changed = wide - strength * torch.tensordot(v, along, dims=0)
    return changed.to(written.dtype)


def rows_without_direction(
    rows: Float[Tensor, "*rest d_model"], direction: Float[Tensor, " d_model"], *, strength: float = 1.0
) -> Float[Tensor, "*rest d_model"]:
    """Return vectors of the residual stream, one per row, without their part along a direction.

    >>> v = torch.tensor([0.6, 0.8])
    >>> rows_without_direction(torch.tensor([[3.0, 4.0], [1.0, 2.0]]), v).round(decimals=6) + 0.0
    tensor([[ 0.0000,  0.0000],
            [-0.3200,  0.2400]])

    Args:
        rows: Embeddings, activations, or a matrix stored as `[d_in, d_model]`.
        direction: Of length 1.
        strength: b, 0 to 1; 0 returns the argument.
    """
    if strength == 0.0:
        return rows
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    v = direction.to(device=wide.device, dtype=wide.dtype)
    return (wide - strength * (wide @ v)[..., None] * v).to(rows.dtype)
