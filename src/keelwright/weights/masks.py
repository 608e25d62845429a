# SPDX-License-Identifier: Apache-2.0
"""Learned masks over the tensors of a model: logits, how they are shared, and the file that keeps both.

The file is safetensors: one tensor of logits for each masked tensor, under its name, and the settings in the metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from keelwright.core.errors import DataError, MissingError
from keelwright.core.files import write_atomic
from keelwright.ops.concrete import Export, Tie, concrete, logit_count, logit_index
from keelwright.ops.philox import stream_key, uniforms
from keelwright.weights.stream import CHUNK_ELEMENTS, as_bytes

_KEY = "keelwright_mask"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Mask:
    """A mask over some tensors of a model. Never changed once it is made."""

    logits: Mapping[str, Tensor]
    """By tensor name: float32, one per entry or per group of entries. Shape `[groups]`."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the masked tensors."""
    tie: Tie = "entry"
    size: int = 64
    """Of a block or head, where the tie has one."""
    temperature: float = 0.5
    """That the logits were learned at; used by the export `sample`."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """How it was learned, for the file."""
    _means: dict[tuple[str, str, int], float] = field(default_factory=dict)
    _latest: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Mask({self.digest()})"

    def digest(self) -> str:
        """Return a digest of logits and settings."""
        parts = hashlib.sha256(f"{self.tie} {self.size} {self.temperature}".encode())
        for name, logits in sorted(self.logits.items()):
            parts.update(f"{name}\x1f{tuple(self.shapes[name])}\x1f".encode())
            parts.update(as_bytes(logits))
        return f"sha256:{parts.hexdigest()}"

    def values(self, name: str, start: int, stop: int, *, export: Export = "mode", seed: int = 0) -> Tensor:
        """Return the mask of elements `start:stop` of a flattened tensor: 0 to 1, float32.

        Args:
            name: A masked tensor.
            start, stop: The run of elements.
            export: How logits become a mask.
            seed: Of the draw, for the export `sample`.
        """
        groups = self._exported(name, export, seed)
        return groups[logit_index(self.shapes[name], self.tie, start, stop, self.size)]

    def _exported(self, name: str, export: Export, seed: int) -> Tensor:
        """Return the mask by group; always made from the whole tensor, so that its bits do not depend on the run."""
        key = (name, export, seed)
        known = self._latest.get(key)
        if known is None:
            logits = self.logits[name]
            if export == "mode":
                known = (logits > 0.0).float()
            elif export == "mean":
                known = torch.sigmoid(logits)
            else:
                draws = uniforms(stream_key(seed, "mask export", name), 0, len(logits))
                known = (concrete(logits, draws, temperature=self.temperature) > 0.5).float()
            # One tensor at a time is in work: the others' masks would only take memory.
            self._latest.clear()
            self._latest[key] = known
        return known

    def mean(self, name: str, *, export: Export = "mode", seed: int = 0) -> float:
        """Return the mean of the whole tensor's mask, summed in float64."""
        key = (name, export, seed)
        if key not in self._means:
            elements = _elements(self.shapes[name])
            total = 0.0
            for start in range(0, elements, CHUNK_ELEMENTS):
                stop = min(elements, start + CHUNK_ELEMENTS)
                total += float(self.values(name, start, stop, export=export, seed=seed).double().sum())
            self._means[key] = total / max(1, elements)
        return self._means[key]


def save_mask(mask: Mask, path: Path) -> None:
    """Write a mask, whole or not at all.

    Raises:
        StorageError: The disk is full or read-only.
    """
    settings = {
        "tie": mask.tie,
        "size": mask.size,
        "temperature": mask.temperature,
        "shapes": {name: list(shape) for name, shape in mask.shapes.items()},
        "recipe": dict(mask.recipe),
    }
    tensors = {name: logits.contiguous() for name, logits in mask.logits.items()}
    write_atomic(path, save(tensors, metadata={"format": "pt", _KEY: json.dumps(settings, sort_keys=True)}))


def load_mask(path: Path) -> Mask:
    """Read a mask that `save_mask` wrote.

    Raises:
        MissingError: There is no such file.
        DataError: The file is no mask, or is incomplete.
    """
    if not path.is_file():
        raise MissingError(
            f"There is no mask '{path}'.", expected="a file of logits", found="nothing", fix="check the path"
        )
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads((file.metadata() or {}).get(_KEY, "null"))
            logits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise _broken(path, str(error)) from error
    if not isinstance(notes, dict):
        raise _broken(path, "safetensors without a mask's settings")
    try:
        shapes = {name: tuple(int(one) for one in notes["shapes"][name]) for name in logits}
        mask = Mask(logits, shapes, notes["tie"], notes["size"], notes["temperature"], notes["recipe"])
        counts = {name: logit_count(shapes[name], mask.tie, mask.size) for name in logits}
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"settings without {error}") from error
    for name, one in logits.items():
        if one.dtype is not torch.float32 or one.shape != (counts[name],):
            raise _broken(path, f"{one.dtype} of shape {list(one.shape)} for '{name}'")
    return mask


def _broken(path: Path, found: str) -> DataError:
    return DataError(
        f"'{path}' is not a mask.",
        expected="logits in float32 with the settings that they were learned with",
        found=found,
        fix="use a file that keelwright wrote as a mask",
    )


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
