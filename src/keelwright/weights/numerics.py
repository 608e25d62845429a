# SPDX-License-Identifier: Apache-2.0
"""The numerical contract of weight arithmetic: widen, check, round once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from keelwright.core.errors import NumericalError
from keelwright.ops.kernels import library, usable

ROUNDING = "float32 evaluation, one rounding to nearest even"


def working_dtype(output: torch.dtype) -> torch.dtype:
    """Return the dtype that an output is evaluated in: float64 for float64, else float32."""
    # Going from float64 to a 16-bit dtype rounds twice in torch (it passes through float32), so float64 is used
    # only where the output itself is that wide.
    return torch.float64 if output is torch.float64 else torch.float32


def widen(values: Tensor, dtype: torch.dtype, buffer: Tensor) -> tuple[Tensor, bool]:
    """Return a run of elements in a wider dtype, and whether all of them are finite.

    Args:
        values: The elements, 1-D, as they are stored.
        dtype: The working dtype.
        buffer: Where the result may be put: as long as `values`, of that dtype.
    """
    compiled = library()
    if compiled is not None and values.device.type == "cpu" and dtype is torch.float32:
        if values.dtype is torch.bfloat16:
            return buffer, not compiled.kw_widen_bf16(values.data_ptr(), values.numel(), buffer.data_ptr())
        if values.dtype is torch.float32:
            return values, not compiled.kw_any_nonfinite(values.data_ptr(), values.numel())
    wide = values if values.dtype is dtype else buffer.copy_(values)
    # A finite sum proves that every term is finite, in one cheap pass.
    return wide, math.isfinite(float(wide.sum()))


def require_finite(values: Tensor, *, role: str, name: str, offset: int, source: str) -> None:
    """Raise `NumericalError` when a run of elements holds NaN or infinity.

    Args:
        values: The elements, 1-D.
        role: The model's role, for the error text.
        name: The tensor's name.
        offset: Index of the first element in the flattened tensor.
        source: The user's own words for the model.
    """
    # A finite sum proves that every term is finite, in one cheap pass; only a sum that is not needs the slow look.
    if math.isfinite(float(values.sum(dtype=working_dtype(values.dtype)))):
        return
    bad = (~torch.isfinite(values)).nonzero()
    if bad.numel() == 0:
        return
    first = int(bad[0, 0])
    raise NumericalError(
        f"'{role}' has a weight that is not a number: tensor '{name}', element {offset + first}.",
        expected=f"finite weights in {source}",
        found=f"{float(values[first])} ({bad.shape[0]} such elements in this part of the tensor)",
        fix="use a checkpoint from before the training run diverged",
    )


def round_once(values: Tensor, dtype: torch.dtype, *, name: str, offset: int) -> Tensor:
    """Return `values` rounded to nearest even in `dtype`.

    Args:
        values: The evaluated elements, 1-D, wide.
        dtype: The output's dtype.
        name: The tensor's name, for the error text.
        offset: Index of the first element in the flattened tensor.

    Raises:
        NumericalError: A value is not finite, or becomes infinite in `dtype`.
    """
    compiled = usable(values) if dtype is torch.bfloat16 else None
    if compiled is not None:
        rounded = torch.empty(values.numel(), dtype=dtype)
        if not compiled.kw_narrow_bf16(values.data_ptr(), values.numel(), rounded.data_ptr()):
            return rounded
    rounded = values.to(dtype)
    if values.numel() == 0:
        return rounded
    low, high = torch.aminmax(values)
    largest = max(-float(low), float(high))
    # Written so that NaN takes the slow path too.
    if largest <= torch.finfo(dtype).max:
        return rounded
    bad = (~torch.isfinite(rounded)).nonzero()
    if bad.numel() == 0:
        return rounded
    first = int(bad[0, 0])
    raise NumericalError(
        f"The edited weights do not fit the output: tensor '{name}', element {offset + first}.",
        expected=f"values up to {torch.finfo(dtype).max:g} in {str(dtype).removeprefix('torch.')}",
        found=f"{float(values[first]):g} ({bad.shape[0]} such elements in this part of the tensor)",
        fix="use a smaller coefficient, or convert the tuned model to bfloat16 or float32 first",
    )
