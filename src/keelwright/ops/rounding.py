# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding: up or down by chance, so that on average nothing is lost.

Rounding to nearest drops every change smaller than half a step; repeated small changes to 16-bit weights then never
happen. Rounded by chance, each change survives in expectation. The chance of element i depends on the key and on i
alone, not on how the tensor is cut.

Source:
    Croci, Fasi, Higham, Mary, Mikaitis: Stochastic rounding: implementation, error analysis and applications, Royal
    Society Open Science 9, 2022; its mode 1: the probability of a neighbour falls linearly with its distance.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.ops.philox import Key, uniforms

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def round_stochastically(
    values: Float[Tensor, " n"], dtype: torch.dtype, *, key: Key, offset: int
) -> Float[Tensor, " n"]:
    """Return `values` in `dtype`, each one of its two neighbours there, the nearer one more often.

    The expectation is the value itself, to within 2^-32 of a step. What `dtype` can hold stays as it is; what lies
    beyond its largest number is as rounding to nearest leaves it: that number, or infinity (NaN where there is none).

    Args:
        values: A run of the flattened tensor, in float32 or float64.
        dtype: A floating-point dtype that is not wider than that of `values`.
        key: The stream: `stream_key(seed, name of the tensor)`.
        offset: Flat index of the first value.
    """
    if values.dtype is dtype or values.numel() == 0:
        return values.to(dtype)
    nearest = values.to(dtype)
    down, up = _neighbours(values, nearest)
    low, high = down.double().abs(), up.double().abs()
    # Beyond the largest number there is no neighbour to round up to.
    share = torch.where(torch.isfinite(high), (values.double().abs() - low) / (high - low), 0.0)
    drawn = uniforms(key, offset, values.numel()).to(values.device)
    bits = _BITS[dtype.itemsize]
    chosen = torch.where(drawn < share, up.view(bits), down.view(bits)).view(dtype)
    inside = torch.isfinite(nearest.float()) & (values.double().abs() <= torch.finfo(dtype).max)
    return torch.where(inside, chosen.view(bits), nearest.view(bits)).view(dtype)


def _neighbours(values: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number at or below each magnitude, and the next one above it, both with the value's sign."""
    kind = _BITS[nearest.element_size()]
    highest = torch.iinfo(kind).min
    sign = torch.where(torch.signbit(values), highest, 0).to(kind)
    # Numbers of one sign are ordered as their bits are.
    magnitude = nearest.view(kind) & torch.iinfo(kind).max
    exact = values.double().abs()
    too_high = magnitude.view(nearest.dtype).double() > exact
    magnitude = magnitude - too_high.to(kind)
    return (magnitude | sign).view(nearest.dtype), ((magnitude + 1) | sign).view(nearest.dtype)
