# SPDX-License-Identifier: Apache-2.0
"""Greedy coordinate search over tokens: one token at a time, the best of many swaps, never worse than before.

Source:
    Virus (arXiv 2501.17433), after the greedy coordinate gradient of Zou et al., arXiv 2307.15043.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keelwright.core.errors import NumericalError

Keeps = Callable[[Int[Tensor, "choices length"]], Bool[Tensor, " choices"]]
"""Says which choices of tokens stay in the search."""


class TokenObjective(Protocol):
    """What is minimised over a choice of tokens."""

    def exact(self, choices: Int[Tensor, "choices length"]) -> Float[Tensor, " choices"]:
        """Return the value of each choice."""

    def slope(self, current: Int[Tensor, " length"], vocab: int) -> Float[Tensor, "length vocab"]:
        """Return the derivative by the one-hot rows of the current tokens."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The best tokens found."""

    ids: Int[Tensor, " length"]
    values: tuple[float, ...]
    """The objective before the first step and after each: never rising."""
    evaluated: int
    """Choices whose objective was computed."""


def best_tokens(
    slope: Float[Tensor, "length vocab"], current: Int[Tensor, " length"], legal: Bool[Tensor, " vocab"], k: int
) -> tuple[Int[Tensor, "length k"], Bool[Tensor, "length k"]]:
    """Return, for each position, the `k` legal tokens with the most negative slope, and which of them are there.

    The current token is no candidate. Where fewer than `k` tokens are legal, the rest is marked as not there.
    """
    allowed = legal.expand_as(slope).clone()
    allowed[torch.arange(len(current)), current] = False
    gain = (-slope).masked_fill(~allowed, -torch.inf)
    top = gain.topk(min(k, slope.shape[1]), dim=1)
    return top.indices, allowed.gather(1, top.indices)


def draw_swaps(
    current: Int[Tensor, " length"],
    tokens: Int[Tensor, "length k"],
    there: Bool[Tensor, "length k"],
    *,
    count: int,
    generator: torch.Generator,
) -> Int[Tensor, "choices length"]:
    """Return up to `count` different choices, each with one token of the current ones replaced by a candidate."""
    pairs = there.cpu().reshape(-1).nonzero().squeeze(1)
    picked = pairs[torch.randperm(len(pairs), generator=generator)[:count]].to(current.device)
    positions, places = picked // tokens.shape[1], picked % tokens.shape[1]
    choices = current.repeat(len(picked), 1)
    choices[torch.arange(len(picked), device=current.device), positions] = tokens[positions, places]
    return choices


def search(
    objective: TokenObjective,
    start: Int[Tensor, " length"],
    legal: Bool[Tensor, " vocab"],
    *,
    steps: int,
    k: int,
    count: int,
    generator: torch.Generator,
    keeps: Keeps | None = None,
) -> SearchResult:
    """Return the tokens that greedy search ends with.

    Args:
        objective: What is minimised.
        start: Tokens to start from.
        legal: Tokens that may be chosen.
        steps: At most so many swaps.
        k: Candidates per position.
        count: Swaps evaluated exactly per step.
        generator: Draws the swaps.
        keeps: Drops choices before they are evaluated.

    Raises:
        NumericalError: The objective of the start is not finite.
    """
    current, best = start, float(objective.exact(start[None])[0])
    if not math.isfinite(best):
        raise NumericalError(
            "The objective of the first row is not finite.",
            expected="a finite number",
            found=str(best),
            fix="look for NaN or infinity in the weights of the model and the guard",
        )
    values, evaluated = [best], 1
    for _ in range(steps):
        tokens, there = best_tokens(objective.slope(current, len(legal)), current, legal, k)
        choices = draw_swaps(current, tokens, there, count=count, generator=generator)
        if keeps is not None and len(choices):
            choices = choices[keeps(choices)]
        if len(choices):
            found = objective.exact(choices)
            evaluated += len(choices)
            # A choice whose value is no number is never taken.
            index = int(torch.where(found.isfinite(), found, torch.inf).argmin())
            if float(found[index]) < best:
                current, best = choices[index], float(found[index])
        values.append(best)
    return SearchResult(current, tuple(values), evaluated)
