# SPDX-License-Identifier: Apache-2.0
"""Maximum mean discrepancy: how far two samples are from having come from one distribution.

    MMD(X, Y) = mean K(X, X) + mean K(Y, Y) - 2 mean K(X, Y)
    K(a, b) = sum_i exp(-||a - b||^2 / s_i),   s_i = s * 2^i / 4,   i = 0..4

The estimator is the biased one: means are over whole blocks, diagonals included, so that it is never below 0. The
bandwidth `s` is the mean squared distance between different points of both samples together; no gradient flows
through it.

Source:
    Gretton et al.: A Kernel Two-Sample Test, JMLR 13 (2012); kernels and bandwidth as in RepNoise, arXiv 2405.14577.
"""

from __future__ import annotations

from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

KERNELS: Final = 5
"""Bandwidths that are summed, each twice the one before; the middle one is `s`."""


def mmd(
    first: Float[Tensor, "points d"], second: Float[Tensor, "others d"], *, bandwidth: float | None = None
) -> Float[Tensor, ""]:
    """Return the squared maximum mean discrepancy of two samples: 0 where they are the same, at most 10.

    Args:
        first: One point per row; evaluated in float32 (float64 stays).
        second: The other sample; their numbers may differ.
        bandwidth: `s`, in squared units of the points; None: the mean squared distance of different points.
    """
    if not len(first) or not len(second):
        return (first.sum() + second.sum()).float()
    points = torch.cat([first, second])
    distances = squared_distances(points if points.dtype is torch.float64 else points.float())
    if bandwidth is None:
        n = len(points)
        spread = distances.detach().sum() / (n * n - n)
    else:
        spread = torch.as_tensor(bandwidth, dtype=distances.dtype, device=distances.device)
    # All points in one place: every kernel is 1, and 0 / 0 must not be asked for.
    spread = spread.clamp_min(torch.finfo(distances.dtype).tiny)
    middle = KERNELS // 2
    kernel = torch.zeros_like(distances)
    for index in range(KERNELS):
        kernel = kernel + torch.exp(-distances / (spread * 2.0 ** (index - middle)))
    cut = len(first)
    across = kernel[:cut, cut:].mean() + kernel[cut:, :cut].mean()
    return kernel[:cut, :cut].mean() + kernel[cut:, cut:].mean() - across


def squared_distances(points: Float[Tensor, "points d"]) -> Float[Tensor, "points points"]:
    """Return the squared L2 distances of all pairs, by one matrix product; the diagonal is exactly 0.

    The points are centred first: a common offset would otherwise cost the digits in which they differ.
    """
    centred = points - points.detach().mean(dim=0)
    products = centred @ centred.T
    lengths = products.diagonal()
    distances = (lengths[:, None] + lengths[None, :] - 2.0 * products).clamp_min(0.0)
    return distances - torch.diag(distances.diagonal())
