# SPDX-License-Identifier: Apache-2.0
"""The compiled inner loops, where the package was built with a C compiler; the torch twins serve everywhere else.

A function that has a compiled twin asks `usable` first. Both give the same bits, except `gram`, whose float64 sums are
taken in another order. `KEELWRIGHT_KERNELS=off` switches the compiled ones off.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = "_kernels.so"
_VERSION = 1
MOST_TERMS = 64
"""Most tensors that one compiled call takes."""

_POINTER, _INT, _LONG, _WORD, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint32, ctypes.c_float
_SIGNATURES: dict[str, tuple[object, ...]] = {
    "kw_widen_bf16": (_POINTER, _LONG, _POINTER),
    "kw_any_nonfinite": (_POINTER, _LONG),
    "kw_narrow_bf16": (_POINTER, _LONG, _POINTER),
    "kw_weighted_sum": (_INT, _POINTER, _POINTER, _LONG, _INT, _POINTER),
    "kw_gram": (_INT, _POINTER, _POINTER, _LONG, _POINTER),
    "kw_histogram": (_POINTER, _LONG, _INT, _WORD, _POINTER),
    "kw_keep_between": (_POINTER, _LONG, _LONG, _WORD, _LONG, _WORD, _LONG, _FLOAT, _POINTER),
    "kw_philox": (_WORD, _WORD, ctypes.c_uint64, _LONG, _POINTER),
    "kw_keep_below": (_POINTER, _POINTER, _LONG, ctypes.c_uint64, _FLOAT, _POINTER),
    "kw_elect": (_INT, _POINTER, _POINTER, _LONG, _INT, _INT, _POINTER),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library, or None where there is none of this version."""
    path = Path(__file__).with_name(LIBRARY)
    if os.environ.get("KEELWRIGHT_KERNELS", "on") == "off" or not path.is_file():
        return None
    try:
        found = ctypes.CDLL(str(path))
        if found.kw_version() != _VERSION:
            return None
    except (OSError, AttributeError):
        # Built for another machine, or by another version of the package.
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes = arguments
        function.restype = _INT if name in ("kw_widen_bf16", "kw_any_nonfinite", "kw_narrow_bf16") else None
    return found


def kind() -> str:
    """Return `compiled` or `plain`: which twins are in use."""
    return "plain" if library() is None else "compiled"


def usable(*tensors: Tensor) -> ctypes.CDLL | None:
    """Return the library when every tensor is a contiguous float32 one on the CPU, else None."""
    found = library()
    if found is None or len(tensors) > MOST_TERMS:
        return None
    fits = all(one.dtype is torch.float32 and one.device.type == "cpu" and one.is_contiguous() for one in tensors)
    return found if fits else None


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Return the addresses of the tensors' values, as C takes a list of arrays."""
    return (ctypes.c_void_p * len(tensors))(*(one.data_ptr() for one in tensors))


def floats(values: Sequence[float]) -> ctypes.Array[ctypes.c_float]:
    """Return numbers as a C array of float32."""
    return (ctypes.c_float * len(values))(*values)
