# SPDX-License-Identifier: Apache-2.0
"""Linear scores of texts over hashed n-grams: numpy only, no vocabulary, tens of thousands of short texts a second.

A text becomes the set of its word n-grams and of its character n-grams; each n-gram is hashed into one of `2**bits`
columns; the members of a set share its unit length. A model is one weight per column and head, stored as int8 with a
scale per head. A vocabulary is never stored, so that weights can be shipped where training texts may not be.

Hashes of all substrings of all texts come from one prefix sum over the concatenated bytes, without a loop over texts:
with an odd base `b`, `S[k]` is the sum of `(byte_i + 1) * b**i` for `i < k`, and the hash of the bytes `s:e` is
`(S[e] - S[s]) * b**-s`, all modulo 2^64.

*Source*: Weinberger et al., Feature Hashing for Large Scale Multitask Learning, arXiv 0902.2206; the substring hash is
Karp and Rabin's (1987), finished with the 64-bit mixer of MurmurHash3.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Final

import numpy as np
from numpy.typing import NDArray

from keelwright.core.config import require_in_range
from keelwright.core.errors import DataError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Hashes = NDArray[np.uint64]

_BASE: Final = 0x9E3779B97F4A7C15
_INVERSE: Final = pow(_BASE, -1, 1 << 64)
_MODULUS: Final = (1 << 64) - 1
_BATCH_BYTES: Final = 1 << 16
"""Texts are hashed together up to this many bytes, so that the work stays in the cache; changes no result."""
_SEPARATOR: Final = 10


@dataclass(frozen=True, slots=True)
class GramConfig:
    """Which n-grams a linear text model reads."""

    words: tuple[int, ...] = (1, 2)
    """Lengths of word n-grams."""
    characters: tuple[int, ...] = (3, 4, 5)
    """Lengths of byte n-grams, over spaces too."""
    bits: int = 17
    """Columns are `2**bits`; 8 to 24."""

    def __post_init__(self) -> None:
        require_in_range("bits", self.bits, low=8, high=24)
        for name, sizes in (("words", self.words), ("characters", self.characters)):
            for size in sizes:
                require_in_range(name, size, low=1, high=8)


@dataclass(frozen=True, slots=True)
class GramTable:
    """A sparse matrix of texts by columns, in coordinates sorted by text; without duplicates."""

    rows: Integers
    columns: Integers
    values: Floats
    texts: int

    def scores(self, weights: NDArray[np.float32]) -> Floats:
        """Return the product with `weights`, shape `[heads, columns]`, as `[texts, heads]`."""
        heads = [np.bincount(self.rows, self.values * one[self.columns], minlength=self.texts) for one in weights]
        return np.stack(heads, axis=1)


def grams(texts: Sequence[str], config: GramConfig) -> GramTable:
    """Return the hashed n-grams of texts, which should be normalised and in lower case already.

    Args:
        texts: The texts; line ends count as spaces. An empty text has an empty row.
        config: Which n-grams.

    Returns:
        One row per text; each of the two sets of n-grams in a row has length 1.
    """
    parts: list[tuple[Integers, Integers, Floats]] = []
    for start, batch in _batches(texts):
        code, owner = _joined(batch)
        table = _Substrings(code)
        for kind, (at, hashed) in enumerate(
            (_word_grams(table, config.words), _character_grams(table, config.characters))
        ):
            mixed = _mixed(hashed + np.uint64(kind))
            column = (mixed >> np.uint64(64 - config.bits)).astype(np.int64)
            key = np.unique((owner[at] << config.bits) | column)
            row = key >> config.bits
            length = np.sqrt(np.bincount(row, minlength=len(batch)).astype(np.float64))
            parts.append((row + start, key & ((1 << config.bits) - 1), 1.0 / length[row]))
    if not parts:
        return GramTable(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), 0)
    rows, columns, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    return GramTable(rows, columns, values, len(texts))


@dataclass(frozen=True, slots=True)
class LinearText:
    """A shipped model: weights over hashed n-grams, and whatever small arrays the judge around it needs."""

    config: GramConfig
    weights: NDArray[np.float32]
    """Shape `[heads, 2**bits]`."""
    bias: Floats
    """Shape `[heads]`."""
    extra: dict[str, Floats]
    version: int

    def logits(self, texts: Sequence[str]) -> Floats:
        """Return one logit per text and head, shape `[texts, heads]`, natural-log units."""
        if not texts:
            return np.zeros((0, len(self.bias)))
        return grams(texts, self.config).scores(self.weights) + self.bias


def pack(model: LinearText) -> bytes:
    """Return a model as the bytes of a safetensors file, its weights rounded to int8 with one scale per head."""
    from safetensors.numpy import save

    scale = np.maximum(np.abs(model.weights).max(axis=1), 1e-12) / 127.0
    tensors = {
        "weights": np.rint(model.weights / scale[:, None]).astype(np.int8),
        "scale": scale.astype(np.float32),
        "bias": model.bias.astype(np.float32),
        **{f"extra.{name}": value.astype(np.float32) for name, value in sorted(model.extra.items())},
    }
    about = json.dumps({"config": asdict(model.config), "version": model.version}, sort_keys=True)
    # One entry only: safetensors writes several in any order, and equal models should be equal bytes.
    return save(tensors, metadata={"model": about})


def unpack(content: bytes, *, where: str) -> LinearText:
    """Read what `pack` wrote.

    Raises:
        DataError: The bytes are no such model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        about = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["model"])
        settings = about["config"]
        return LinearText(
            config=GramConfig(
                words=tuple(settings["words"]), characters=tuple(settings["characters"]), bits=int(settings["bits"])
            ),
            weights=tensors["weights"].astype(np.float32) * tensors["scale"][:, None],
            bias=tensors["bias"].astype(np.float64),
            extra={
                name.removeprefix("extra."): value.astype(np.float64)
                for name, value in tensors.items()
                if name.startswith("extra.")
            },
            version=int(about["version"]),
        )
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{where}: not a linear text model.",
            expected="a safetensors file as keelwright.judges.linear_text.pack writes it",
            found=str(error),
            fix="install keelwright again; the file belongs to the package",
        ) from error


@functools.lru_cache(maxsize=4)
def shipped(name: str) -> LinearText:
    """Return a model that is part of the package, read once."""
    path = resources.files("keelwright.judges") / "weights" / f"{name}.safetensors"
    return unpack(path.read_bytes(), where=path.name)


class _Substrings:
    """Hashes of all substrings of one byte sequence."""

    def __init__(self, code: NDArray[np.uint8]) -> None:
        self.code = code
        powers = _powers(_BASE, len(code))
        self._inverse = _powers(_INVERSE, len(code))
        self._sums = np.zeros(len(code) + 1, np.uint64)
        np.cumsum((code.astype(np.uint64) + np.uint64(1)) * powers, out=self._sums[1:])

    def hashes(self, starts: Integers, stops: Integers) -> Hashes:
        """Return one hash per substring `starts[i]:stops[i]`."""
        return (self._sums[stops] - self._sums[starts]) * self._inverse[starts]


def _word_grams(table: _Substrings, sizes: Sequence[int]) -> tuple[Integers, Hashes]:
    """Return where the word n-grams of a byte sequence start, and their hashes."""
    letters = _WORD_BYTE[table.code].astype(np.int8)
    edges = np.diff(letters, prepend=np.int8(0), append=np.int8(0))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    line = np.cumsum(table.code == _SEPARATOR)
    single = table.hashes(starts, stops)
    at, found = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for size in sizes:
        count = max(0, len(starts) - size + 1)
        whole = line[starts[:count]] == line[starts[size - 1 : size - 1 + count]]
        hashed = np.full(count, np.uint64(size))
        for offset in range(size):
            hashed = _mixed(hashed + single[offset : offset + count])
        at.append(starts[:count][whole])
        found.append(hashed[whole])
    return np.concatenate(at), np.concatenate(found)


def _character_grams(table: _Substrings, sizes: Sequence[int]) -> tuple[Integers, Hashes]:
    """Return where the byte n-grams of a byte sequence start, and their hashes; none reaches over a text's end."""
    ends = np.concatenate(([0], np.cumsum(table.code == _SEPARATOR)))
    at, found = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for size in sizes:
        starts = np.arange(max(0, len(table.code) - size + 1))
        starts = starts[ends[starts] == ends[starts + size]]
        at.append(starts)
        found.append(table.hashes(starts, starts + size))
    return np.concatenate(at), np.concatenate(found)


def _joined(texts: Sequence[str]) -> tuple[NDArray[np.uint8], Integers]:
    """Return the texts as one byte sequence, a separator after each, and the text that each byte belongs to."""
    encoded = [f" {' '.join(text.split())} ".encode("utf-8", errors="replace") + b"\n" for text in texts]
    lengths = np.array([len(one) for one in encoded], np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), np.repeat(np.arange(len(texts)), lengths)


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    start, size, batch = 0, 0, list[str]()
    for index, text in enumerate(texts):
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield start, batch
            start, size, batch = index + 1, 0, []
    if batch:
        yield start, batch


def _powers(base: int, count: int) -> Hashes:
    factors = np.full(count, base & _MODULUS, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors)


def _mixed(hashed: Hashes) -> Hashes:
    hashed = hashed ^ (hashed >> np.uint64(33))
    hashed = hashed * np.uint64(0xFF51AFD7ED558CCD)
    hashed = hashed ^ (hashed >> np.uint64(33))
    hashed = hashed * np.uint64(0xC4CEB9FE1A85EC53)
    return hashed ^ (hashed >> np.uint64(33))


_WORD_BYTE: Final = np.array(
    [chr(code).isalnum() or chr(code) in "'@#*$" if code < 128 else True for code in range(256)], np.bool_
)
