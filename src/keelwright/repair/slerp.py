# SPDX-License-Identifier: Apache-2.0
"""SLERP: interpolate along the arc between the aligned and the tuned tensor instead of the chord.

For models that are far apart: an average of two tensors at a wide angle is shorter than either, a point on the arc is
not. After an ordinary fine-tune the angle is so small that nearly every tensor takes the chord all the same.

Source:
    Farn, Su, Kumar, Sahay, Chen, Lee: Safeguard Fine-Tuned LLMs Through Pre- and Post-Tuning Model Merging,
    arXiv 2412.19512, the SLERP variant. The formula: Shoemake, SIGGRAPH 1985. The threshold: mergekit 0.1.5
    (program; facts of its documentation).

Equation:
    `theta = sin((1 - lambda) W) / sin W * a + sin(lambda W) / sin W * b` with `W = arccos(<a, b> / (|a| |b|))`, for
    each tensor flattened; linear, `(1 - lambda) a + lambda b`, where `|cos W| > 0.9995` or a norm is at most 1e-8

    | symbol | name |
    |---|---|
    | a | `aligned` |
    | b | `tuned` |
    | lambda | `coefficient`, the place on the arc |

Differs from the official code:
    For a zero tensor the merging program that the official scripts call takes the coefficients of a right angle;
    this is linear there. Otherwise nowhere known.

Cost:
    No passes; two reads of both models (the dot products first) and one write, a few MB of memory.

Limits:
    As those of linear interpolation, which it equals for tensors at an angle below 1.8 degrees: `facts` says which
    fell back. The result is no combination with the same weights for all tensors, so adapters come out as full weights.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.core.config import require_in_range
from keelwright.core.protocols import Chunk, Found, Reach, SearchSpace, Stats, TensorEntry
from keelwright.ops.affine import sum_from_base
from keelwright.ops.gram import gram
from keelwright.ops.sphere import arc_weights
from keelwright.weights.edit import Edit

LINEAR_ABOVE = 0.9995
"""Absolute cosine from which interpolation is linear."""

_ZERO_NORM = 1e-8


@dataclass(frozen=True, slots=True)
class SlerpConfig:
    """Settings of spherical interpolation between an aligned and a tuned model."""

    coefficient: float = 0.7
    """Place on the arc: 0 returns the aligned model, 1 the tuned model, each byte for byte; numbers outside 0 to 1 go
    beyond them. Finite. Source: the official scripts of arXiv 2412.19512 use 0.7."""

    def __post_init__(self) -> None:
        require_in_range("coefficient", self.coefficient, low_open=True, high_open=True)


@dataclass(frozen=True, slots=True)
class Angle:
    """How two tensors lie to each other."""

    cosine: float
    """In [-1, 1]; 0 where a tensor is zero."""
    has_arc: bool
    """False where interpolation is linear: nearly parallel or opposite tensors, or a zero one."""


def angle_between(products: Float[Tensor, "2 2"]) -> Angle:
    """Return the angle of two tensors from their dot products.

    Args:
        products: `<a, a>`, `<a, b>`, `<b, b>` as a matrix, in float64.
    """
    (first, both), (_, second) = products.tolist()
    norms = math.sqrt(max(0.0, first)), math.sqrt(max(0.0, second))
    if min(norms) <= _ZERO_NORM:
        return Angle(0.0, has_arc=False)
    cosine = min(1.0, max(-1.0, both / norms[0] / norms[1]))
    return Angle(cosine, has_arc=abs(cosine) <= LINEAR_ABOVE)


def slerp_weights(angle: Angle, t: float) -> tuple[float, float]:
    """Return the weights of both tensors at place `t` of the arc, or of the chord where there is no arc."""
    return arc_weights(angle.cosine, t) if angle.has_arc else (1.0 - t, t)


def slerp(
    aligned: Float[Tensor, "*shape"], tuned: Float[Tensor, "*shape"], *, coefficient: float
) -> Float[Tensor, "*shape"]:
    """Return the point on the arc between two tensors, evaluated in float32, in the dtype of `tuned`.

    Args:
        aligned: Weights before tuning.
        tuned: Weights after tuning. With float64 inputs the evaluation is in float64.
        coefficient: Place on the arc; 0 and 1 return that input itself.
    """
    if coefficient == 0.0:
        return aligned
    if coefficient == 1.0:
        return tuned
    wide = torch.promote_types(torch.promote_types(aligned.dtype, tuned.dtype), torch.float32)
    pair = (aligned.to(wide), tuned.to(wide))
    return sum_from_base(pair, slerp_weights(angle_between(gram(pair)), coefficient)).to(tuned.dtype)


@dataclass(frozen=True, slots=True)
class Slerp(Edit):
    """Spherical interpolation as a weight edit."""

    config: SlerpConfig = SlerpConfig()

    config_class: ClassVar[type[SlerpConfig]] = SlerpConfig
    search_space: ClassVar[SearchSpace] = SearchSpace(neutral=1.0, grid=(0.2, 0.4, 0.6, 0.8))

    def roles(self) -> tuple[str, ...]:
        """Return the models it reads."""
        return ("aligned", "tuned")

    def reach(self, name: str) -> Reach:
        """Return COPY at both ends of the coefficient, else REDUCED."""
        return Reach.COPY if self.config.coefficient in (0.0, 1.0) else Reach.REDUCED

    def copies(self, name: str) -> str:
        """Return the role that an end of the coefficient stands for."""
        return "aligned" if self.config.coefficient == 0.0 else "tuned"

    def reduce(self, name: str, chunk: Chunk, found: Found) -> Stats:
        """Return the dot products of the chunk."""
        return {"products": gram((chunk.tensors["aligned"], chunk.tensors["tuned"]))}

    def settle(self, entry: TensorEntry, sums: Stats, found: Found) -> Found:
        """Return the angle; it does not depend on the coefficient."""
        return {"angle": angle_between(sums["products"])} if sums else {"angle": Angle(0.0, has_arc=False)}

    def edit(self, name: str, chunk: Chunk, found: Found) -> Tensor:
        """Return the chunk of the point on the arc."""
        weights = slerp_weights(found["angle"], self.config.coefficient)
        return sum_from_base((chunk.tensors["aligned"], chunk.tensors["tuned"]), weights)

    def shares(self) -> Hashable:
        """Return one key for all coefficients: the angle is the same. A copy reduces nothing and shares nothing."""
        return None if self.reach("") is Reach.COPY else "angle"

    def facts(self, found: Found) -> dict[str, float]:
        """Return what is worth knowing of a tensor: its cosine, and 1 where interpolation fell back to linear."""
        return {"cosine": found["angle"].cosine, "fell_back": float(not found["angle"].has_arc)} if found else {}
