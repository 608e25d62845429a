# SPDX-License-Identifier: Apache-2.0
"""Counter-based random numbers: element i of a stream is a function of the key and of i alone.

Masks drawn from it do not depend on the order in which tensors are processed, on the size of chunks or on the number of
workers.

Source:
    Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3, SC 2011; Philox4x32 with 10 rounds. Word
    `4 c + j` of a stream is output j for the counter (c low, c high, 0, 0).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from keelwright.core.seeds import derive_seed
from keelwright.ops.kernels import library, usable

Key = tuple[int, int]
"""Two 32-bit words."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def stream_key(seed: int, *names: str) -> Key:
    """Return the key of a named stream, for example that of one tensor of one model."""
    value = derive_seed(seed, "\x1f".join(names))
    return value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF


def philox4x32(counter: NDArray[np.uint32], key: Key) -> NDArray[np.uint32]:
    """Return ten rounds of Philox4x32 for each row of four counter words."""
    words = [counter[:, i].astype(np.uint64) for i in range(4)]
    first, second = np.uint64(key[0]), np.uint64(key[1])
    for _ in range(10):
        low, high = words[0] * np.uint64(_MULTIPLIERS[0]), words[2] * np.uint64(_MULTIPLIERS[1])
        words = [(high >> _HALF) ^ words[1] ^ first, high & _LOW, (low >> _HALF) ^ words[3] ^ second, low & _LOW]
        first, second = (first + np.uint64(_WEYL[0])) & _LOW, (second + np.uint64(_WEYL[1])) & _LOW
    return np.stack(words, axis=1).astype(np.uint32)


def philox_words(key: Key, first: int, count: int) -> NDArray[np.uint32]:
    """Return words `first : first + count` of a stream, each uniform over 32 bits.

    Args:
        key: The stream's key.
        first: Index of the first word, 0 or more.
        count: Number of words.
    """
    compiled = library()
    if compiled is not None:
        out = np.empty(count, dtype=np.uint32)
        compiled.kw_philox(key[0], key[1], first, count, out.ctypes.data)
        return out
    blocks = np.arange(first // 4, -(-(first + count) // 4), dtype=np.uint64)
    counter = np.zeros((len(blocks), 4), dtype=np.uint32)
    counter[:, 0], counter[:, 1] = blocks & _LOW, blocks >> _HALF
    skip = first % 4
    return philox4x32(counter, key).reshape(-1)[skip : skip + count]


def uniforms(key: Key, first: int, count: int) -> Float[Tensor, " n"]:
    """Return words of a stream as float64 numbers in (0, 1): the middles of 2^32 equal intervals."""
    return torch.from_numpy((philox_words(key, first, count).astype(np.float64) + 0.5) * 2.0**-32)


def keep_randomly(
    values: Float[Tensor, " n"], *, probability: float, key: Key, offset: int, scale: float = 1.0
) -> Float[Tensor, " n"]:
    """Return `values * scale` where element `offset + i` of the stream falls below `probability`, 0 elsewhere.

    Args:
        values: A run of the flattened tensor.
        probability: Chance to be kept, 0 to 1; met to within 2^-32.
        key: The stream.
        offset: Flat index of the first value.
        scale: What is kept is multiplied with it, for example 1 / probability.
    """
    threshold = round(probability * 2.0**32)
    words = philox_words(key, offset, values.numel())
    out = torch.empty_like(values)
    compiled = usable(values, out)
    if compiled is not None:
        compiled.kw_keep_below(values.data_ptr(), words.ctypes.data, values.numel(), threshold, scale, out.data_ptr())
        return out
    factor = scale if values.dtype is torch.float64 else float(np.float32(scale))
    return torch.where(torch.from_numpy(words.astype(np.int64)) < threshold, values * factor, 0.0)
