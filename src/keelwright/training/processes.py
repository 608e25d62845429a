# SPDX-License-Identifier: Apache-2.0
"""How gradients meet across processes: here where every process holds all weights, in `sharding` where none does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from keelwright.ops.gradients import Gradient, squared_norm


class Processes(Protocol):
    """The processes of a training run, as the gradient composer sees them."""

    def gradient(self, loss: Tensor, weights: Sequence[Tensor]) -> Gradient:
        """Return the gradient of this process's share of the loss; None where a weight does not matter."""

    def reduce(self, gradient: Gradient) -> Gradient:
        """Return the sum of a gradient over the processes."""

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a small tensor over the processes."""

    def norm(self, gradient: Gradient) -> Tensor:
        """Return the L2 norm of a reduced gradient over all weights, in float32. Shape `[]`."""


class Replicated:
    """Every process holds all weights; sums are taken when the composer asks for them, once per composed gradient."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def gradient(self, loss: Tensor, weights: Sequence[Tensor]) -> Gradient:
        """Return what autograd says of this process's share; in float32 where the weights are in half precision."""
        return in_float32(torch.autograd.grad(loss, list(weights), allow_unused=True))

    def reduce(self, gradient: Gradient) -> Gradient:
        """Return the sum over the processes. All of them use the same weights: None is None everywhere."""
        if self._accelerator.num_processes == 1:
            return gradient
        return [None if one is None else self._accelerator.reduce(one, reduction="sum") for one in gradient]

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over the processes."""
        if self._accelerator.num_processes == 1:
            return value
        total: Tensor = self._accelerator.reduce(value, reduction="sum")
        return total

    def norm(self, gradient: Gradient) -> Tensor:
        """Return the norm; the same in every process."""
        return squared_norm(gradient).sqrt()


def in_float32(gradient: Sequence[Tensor | None]) -> Gradient:
    """Return a gradient whose half-precision entries are float32: what is summed, and subtracted, must not be rounded.

    The difference of two gradients that are nearly equal, as Booster takes it, has few right bits left in bfloat16.
    """
    return [
        one.float() if one is not None and one.dtype in (torch.bfloat16, torch.float16) else one for one in gradient
    ]


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor, sharing memory; one that is not spread over processes is its own part."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    return cast("DTensor", tensor.detach()).to_local()
