# SPDX-License-Identifier: Apache-2.0
"""Dot products between all pairs of some tensors: what norms, angles and similarities are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from keelwright.ops.kernels import pointers, usable


def gram(
    tensors: Sequence[Float[Tensor, "*shape"]], base: Float[Tensor, "*shape"] | None = None
) -> Float[Tensor, "models models"]:
    """Return `<x_i - base, x_j - base>` for all pairs, in float64; without a base `<x_i, x_j>`.

    Differences are taken in the tensors' dtype, products and sums in float64.

    Args:
        tensors: One per model, all of one shape.
        base: What is subtracted from each first.
    """
    count = len(tensors)
    out = torch.zeros(count, count, dtype=torch.float64)
    library = usable(*tensors, *(() if base is None else (base,)))
    if library is not None:
        origin = None if base is None else base.data_ptr()
        library.kw_gram(count, pointers(tensors), origin, tensors[0].numel(), out.data_ptr())
        return out
    rows = [(one if base is None else one - base).double().flatten() for one in tensors]
    for i in range(count):
        for j in range(i, count):
            out[i, j] = out[j, i] = rows[i] @ rows[j]
    return out


def cosines(products: Float[Tensor, "models models"]) -> Float[Tensor, "models models"]:
    """Return the cosines that belong to a matrix of dot products, clipped to [-1, 1]; 0 where a vector is zero."""
    norms = products.diagonal().clamp_min(0.0).sqrt()
    sizes = norms[:, None] * norms[None, :]
    return torch.where(sizes > 0.0, products / sizes, 0.0).clamp_(-1.0, 1.0)
