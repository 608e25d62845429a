# SPDX-License-Identifier: Apache-2.0
"""Concrete masks: relaxed coin flips with a logit for each entry, or one shared by a row, a column or a block.

A tensor is seen as rows of its last axis; a vector is one row.

Source:
    Maddison, Mnih, Teh: The Concrete Distribution, arXiv 1611.00712; Jang, Gu, Poole, arXiv 1611.01144.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Tie = Literal["entry", "row", "column", "block", "head"]
"""Who shares a logit: nobody; a row; a column; `size` neighbours in a row; all entries of `size` neighbouring rows."""

Export = Literal["mode", "sample", "mean"]
"""mode: 1 where the logit is above 0; sample: 1 where a draw is above one half; mean: the sigmoid of the logit."""

UNIFORM_MARGIN = 1e-6
"""Uniform numbers stay this far from 0 and 1, so that their logits are finite."""

MEAN_FLOOR = 1e-3
"""Mean of a mask below which its tensor is dropped instead of rescaled."""


def logit_count(shape: tuple[int, ...], tie: Tie, size: int = 64) -> int:
    """Return how many logits a tensor has.

    Args:
        shape: Of the tensor.
        tie: Who shares a logit.
        size: Of a block or head.
    """
    columns = shape[-1] if shape else 1
    rows = math.prod(shape[:-1]) if shape else 1
    counts = {
        "entry": rows * columns,
        "row": rows,
        "column": columns,
        "block": rows * -(-columns // size),
        "head": -(-rows // size),
    }
    return counts[tie]


def logit_index(shape: tuple[int, ...], tie: Tie, start: int, stop: int, size: int = 64) -> Int[Tensor, " n"]:
    """Return which logit each of the elements `start:stop` of the flattened tensor uses."""
    columns = shape[-1] if shape else 1
    place = torch.arange(start, stop)
    if tie == "entry":
        return place
    if tie == "column":
        return place % columns
    rows = place // columns
    if tie == "row":
        return rows
    if tie == "head":
        return rows // size
    return rows * -(-columns // size) + (place % columns) // size


def spread(
    values: Float[Tensor, " groups"], shape: tuple[int, ...], tie: Tie, size: int = 64
) -> Float[Tensor, "*shape"]:
    """Return one value for each entry of the tensor from one for each logit; gradients flow back.

    Args:
        values: One per logit.
        shape: Of the tensor.
        tie: Who shares a logit.
        size: Of a block or head.
    """
    columns = shape[-1] if shape else 1
    rows = math.prod(shape[:-1]) if shape else 1
    if tie == "row":
        values = values[:, None].expand(rows, columns)
    elif tie == "column":
        values = values[None, :].expand(rows, columns)
    elif tie == "head":
        values = values.repeat_interleave(size)[:rows, None].expand(rows, columns)
    elif tie == "block":
        values = values.view(rows, -1).repeat_interleave(size, dim=1)[:, :columns]
    return values.reshape(shape)


def concrete(
    logits: Float[Tensor, " groups"], uniform: Float[Tensor, " groups"], *, temperature: float
) -> Float[Tensor, " groups"]:
    """Return `sigmoid((x + log u - log(1 - u)) / T)`; the closer to bits the smaller the temperature.

    Args:
        logits: x; the chance of a value above one half is `sigmoid(x)` at every temperature.
        uniform: u in (0, 1); clamped away from both ends.
        temperature: T, above 0.
    """
    u = uniform.clamp(UNIFORM_MARGIN, 1.0 - UNIFORM_MARGIN)
    noise = (torch.log(u) - torch.log1p(-u)).to(logits.dtype)
    return torch.sigmoid((logits + noise) / temperature)


def harden(mask: Float[Tensor, " groups"]) -> Float[Tensor, " groups"]:
    """Return 0 or 1 by one half, with the gradient of the mask itself (straight through)."""
    return mask + ((mask > 0.5).to(mask.dtype) - mask).detach()


def rescaled(mask: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the mask divided by its mean, so that its mean is one; zero where the mean is below `MEAN_FLOOR`."""
    mean = mask.mean()
    return mask / mean if float(mean.detach()) >= MEAN_FLOOR else torch.zeros_like(mask)
