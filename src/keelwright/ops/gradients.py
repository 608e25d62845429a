# SPDX-License-Identifier: Apache-2.0
"""Gradients as lists of tensors, one per trained weight: sums, norms, dot products, projections.

An entry is None where a loss does not depend on the weight, as autograd says it; None counts as zero. Everything runs
as fused loops over all tensors (`torch._foreach_*`), with norms and dot products summed in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Gradient = list[Tensor | None]


def add_scaled(total: Sequence[Tensor | None], other: Sequence[Tensor | None], scale: float = 1.0) -> Gradient:
    """Return `total + scale * other`; neither argument is changed.

    Args:
        total: One tensor or None per weight.
        other: The same weights in the same order.
        scale: Factor of `other`.
    """
    found: Gradient = []
    both: list[tuple[int, Tensor, Tensor]] = []
    for index, (left, right) in enumerate(zip(total, other, strict=True)):
        if right is None:
            found.append(left)
        elif left is None:
            found.append(right if scale == 1.0 else right * scale)
        else:
            found.append(None)
            both.append((index, left, right))
    if both:
        places, lefts, rights = zip(*both, strict=True)
        for index, one in zip(places, torch._foreach_add(lefts, rights, alpha=scale), strict=True):
            found[index] = one
    return found


def scaled(gradient: Sequence[Tensor | None], scale: float) -> Gradient:
    """Return `scale * gradient`; by 1 the same tensors, bit for bit."""
    if scale == 1.0:
        return list(gradient)
    return [None if one is None else one * scale for one in gradient]


def squared_norm(gradient: Sequence[Tensor | None]) -> Tensor:
    """Return the square of the L2 norm over all tensors, in float32. Shape `[]`."""
    present = [one.float() for one in gradient if one is not None]
    if not present:
        return torch.zeros(())
    return _whole(torch.stack(torch._foreach_norm(present)).square().sum())


def dot(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> Tensor:
    """Return the dot product over all tensors: float32 within a tensor, float64 across. Shape `[]`."""
    pairs = [(one, two) for one, two in zip(left, right, strict=True) if one is not None and two is not None]
    if not pairs:
        return torch.zeros((), dtype=torch.float64)
    products = torch._foreach_mul([one.float() for one, _ in pairs], [two.float() for _, two in pairs])
    return torch.stack([_whole(one.sum()) for one in products]).double().sum()


def _whole(total: Tensor) -> Tensor:
    """Return a sum over all processes where the tensors are spread over them (FSDP2): a part reads as a number too."""
    full: Tensor = total.full_tensor() if hasattr(total, "full_tensor") else total
    return full
