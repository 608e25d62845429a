# SPDX-License-Identifier: Apache-2.0
"""NearSwap: take the tuned weights where they are near the aligned ones, and move the others by a fixed step only.

Undoes exactly the large single changes and keeps the small ones: the opposite of trimming. Worth a trial where what
broke safety sits in few weights that moved far.

Source:
    alchemonaut: model card of QuartetAnemoi-70B-t0.0001 (no paper); merge method `nearswap` of mergekit 0.1.5 (facts
    of its documentation).

Equation:
    `out = b + clip(x - b, -t, t)`

    | symbol | name |
    |---|---|
    | b | `aligned` |
    | x | `tuned` |
    | t | `t`, the largest change per weight |

Differs from the official code:
    The official form is `q x + (1 - q) b` with `q = clip(t / max(|x - b|, 1e-6), 0, 1)`; for t of at least 1e-6 it is
    the same function, for smaller t it moves differences below 1e-6 by less than t. The clip is exact at both ends.

Cost:
    No passes; one read of both models and one write, a few MB of memory.

Limits:
    `t` is in units of the weights, so a value does not carry over between architectures. In 16-bit weights a change
    below half a unit in the last place is rounded away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace
from keelwright.weights.edit import Edit


@dataclass(frozen=True, slots=True)
class NearswapConfig:
    """Settings of NearSwap."""

    t: float = 1e-4
    """Largest change per weight, in units of the weights, 0 or more. 0 returns the aligned model, infinity the tuned
    one, each byte for byte. Source: the model card's name, t0.0001."""

    def __post_init__(self) -> None:
        require_in_range("t", self.t, low=0.0)


def nearswap(aligned: Float[Tensor, "*shape"], tuned: Float[Tensor, "*shape"], *, t: float) -> Float[Tensor, "*shape"]:
    """Return `aligned + clip(tuned - aligned, -t, t)`, evaluated in float32, in the dtype of `tuned`.

    Args:
        aligned: Weights that the result stays near.
        tuned: Weights taken over where they are at most `t` away. With float64 inputs the evaluation is in float64.
        t: Largest change per weight; 0 and infinity return that input itself.
    """
    if t == 0.0:
        return aligned
    if math.isinf(t):
        return tuned
    wide = torch.promote_types(torch.promote_types(aligned.dtype, tuned.dtype), torch.float32)
    start, end = aligned.to(wide), tuned.to(wide)
    difference = end - start
    step = difference.clamp(-t, t)
    # Where nothing is clipped the tuned weight itself: base + (x - base) may differ from x in the last place.
    return torch.where(step == difference, end, start + step).to(tuned.dtype)


@dataclass(frozen=True, slots=True)
class Nearswap(Edit):
    """NearSwap as a weight edit."""

    config: NearswapConfig = NearswapConfig()

    config_class: ClassVar[type[NearswapConfig]] = NearswapConfig
    # No weight of a language model moves by 1 in tuning: such a bound leaves the tuned model as it is.
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=1.0, grid=(1e-5, 1e-4, 1e-3, 1e-2), setting="t")

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return ("aligned", "tuned")

    def reach(self, name: str) -> Reach:
        """Return COPY for no change and for any change, else POINTWISE."""
        return Reach.COPY if self.config.t == 0.0 or math.isinf(self.config.t) else Reach.POINTWISE

    def copies(self, name: str) -> str:
        """Return the aligned model for a bound of 0, else the tuned."""
        return "aligned" if self.config.t == 0.0 else "tuned"

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the chunk with every change kept within the bound."""
        return nearswap(chunk.tensors["aligned"], chunk.tensors["tuned"], t=self.config.t)
