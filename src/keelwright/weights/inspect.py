# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as data: what is in one, and how two differ, tensor by tensor, in a few megabytes of memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from keelwright.core.errors import ModelMismatchError
from keelwright.core.protocols import Progress, Silent, TensorEntry, TensorSource
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.headers import FLOAT_DTYPES, tensor_bytes
from keelwright.ops.gram import gram
from keelwright.weights.layout import natural_key
from keelwright.weights.plan import Configured, ties_of
from keelwright.weights.sources import source_digest

_CHUNK = 1 << 20
"""Elements looked at at a time."""


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """How one tensor of two models differs."""

    name: str
    elements: int
    changed: int
    """Elements with another value; equal numbers in different dtypes do not count."""
    relative_norm: float
    """`||b - a|| / ||a||`; infinite where `a` is zero and `b` is not."""
    cosine: float
    """Between the two flattened tensors; 1 where they are equal, 0 where one of them alone is zero."""
    largest: float
    """Largest absolute difference of an element, in weight units."""
    nonfinite: int
    """Elements that are NaN or infinite in one of the two; they are left out of the other figures."""

    @property
    def is_equal(self) -> bool:
        """Whether no element differs."""
        return self.changed == 0


def info(source: TensorSource, *, tensors: bool = False) -> dict[str, Any]:
    """Return what a model holds, from headers alone but for the digest.

    Args:
        source: A checkpoint, with adapters or without.
        tensors: List every tensor too.
    """
    entries = source.entries().values()
    dtypes: Counter[str] = Counter()
    for entry in entries:
        dtypes[entry.dtype] += entry.elements
    config = source.config_json() if isinstance(source, Configured) else {}
    document: dict[str, Any] = {
        "schema": 1,
        "command": "weights info",
        "model": source.describe(),
        "architecture": next(iter(config.get("architectures") or []), config.get("model_type")),
        "tensors": len(entries),
        "parameters": sum(entry.elements for entry in entries if entry.dtype in FLOAT_DTYPES),
        "bytes": sum(tensor_bytes(entry) for entry in entries),
        "elements_by_dtype": dict(dtypes.most_common()),
        "tied": ties_of(source),
        "files": _files(source),
        "digest": source_digest(source),
    }
    if tensors:
        ordered = sorted(entries, key=lambda one: natural_key(one.name))
        document["entries"] = [{"name": one.name, "dtype": one.dtype, "shape": list(one.shape)} for one in ordered]
    return document


def diff(first: TensorSource, second: TensorSource, *, progress: Progress | None = None) -> dict[str, Any]:
    """Return how two models differ: names, shapes, dtypes, and every tensor that both hold.

    Args:
        first: The model from before, `a` in the figures.
        second: The model from after, `b`.
        progress: Told about every tensor, in bytes.

    Raises:
        ModelMismatchError: No tensor has the same name and shape in both.
    """
    progress = progress or Silent()
    own, others = first.entries(), second.entries()
    shared = [entry for name, entry in own.items() if name in others and others[name].shape == entry.shape]
    if not shared:
        raise ModelMismatchError(
            f"'{first.describe()}' and '{second.describe()}' have no tensor in common.",
            expected="two models of one architecture and size",
            found=f"{next(iter(own), 'nothing')} in the one and {next(iter(others), 'nothing')} in the other",
            fix="pass a model and what was made of it",
        )
    progress.stage("compare", total=sum(map(tensor_bytes, shared)), unit="B")
    rows = []
    for entry in sorted(shared, key=lambda one: natural_key(one.name)):
        rows.append(_difference(entry, first, second))
        progress.advance(tensor_bytes(entry))
    return {
        "schema": 1,
        "command": "weights diff",
        "first": first.describe(),
        "second": second.describe(),
        "only_first": sorted((name for name in own if name not in others), key=natural_key),
        "only_second": sorted((name for name in others if name not in own), key=natural_key),
        "other_shape": sorted(
            (name for name in own if name in others and others[name].shape != own[name].shape), key=natural_key
        ),
        "other_dtype": sorted((one.name for one in shared if others[one.name].dtype != one.dtype), key=natural_key),
        "equal": sum(row.is_equal for row in rows),
        "compared": len(rows),
        "changed_elements": sum(row.changed for row in rows),
        "elements": sum(row.elements for row in rows),
        "tensors": [asdict(row) for row in rows if not row.is_equal or row.nonfinite],
    }


def _difference(entry: TensorEntry, first: TensorSource, second: TensorSource) -> TensorDifference:
    changed, nonfinite, largest = 0, 0, 0.0
    products = torch.zeros(3, 3, dtype=torch.float64)
    for start in range(0, entry.elements, _CHUNK):
        stop = min(entry.elements, start + _CHUNK)
        pair = (first.read(entry.name, start, stop), second.read(entry.name, start, stop))
        a, b = (values.double() if values.dtype is torch.float64 else values.float() for values in pair)
        a, b, bad = _finite_pair(a, b)
        nonfinite += bad
        differences = b.to(torch.promote_types(a.dtype, b.dtype)) - a
        changed += int(torch.count_nonzero(differences))
        largest = max(largest, float(differences.abs().max()) if differences.numel() else 0.0)
        products += gram([a.to(differences.dtype), b.to(differences.dtype), differences])
    before, after, moved = (math.sqrt(max(0.0, float(products[i, i]))) for i in range(3))
    relative = moved / before if before else (math.inf if moved else 0.0)
    cosine = float(products[0, 1]) / (before * after) if before and after else float(before == after)
    return TensorDifference(
        entry.name, entry.elements, changed, relative, max(-1.0, min(1.0, cosine)), largest, nonfinite
    )


def _finite_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return both with zeros where either is not finite, and how many elements those are."""
    good = torch.isfinite(a) & torch.isfinite(b)
    bad = good.numel() - int(good.sum())
    return (a, b, 0) if bad == 0 else (torch.where(good, a, 0.0), torch.where(good, b, 0.0), bad)


def _files(source: TensorSource) -> list[dict[str, Any]]:
    if not isinstance(source, Checkpoint):
        return []
    return [
        {"file": header.path.name, "bytes": header.file_bytes, "tensors": len(header.tensors)}
        for header in source.headers()
    ]


def group_differences(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return differences of all layers put together by the kind of tensor, largest relative change first.

    Args:
        rows: The `tensors` of `diff`.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(".".join("*" if part.isdigit() else part for part in row["name"].split(".")), []).append(row)
    found = [
        {
            "tensors": name,
            "count": len(members),
            "changed": sum(one["changed"] for one in members) / max(1, sum(one["elements"] for one in members)),
            "relative_norm": max(one["relative_norm"] for one in members),
            "cosine": min(one["cosine"] for one in members),
        }
        for name, members in groups.items()
    ]
    return sorted(found, key=lambda one: -one["relative_norm"])
