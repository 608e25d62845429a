# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run: weights, optimiser and step, written whole or not at all.

A checkpoint is the folder `step-000100`: it is written under another name and renamed when it is complete, and the
one before goes only then. A killed run therefore leaves the newest complete checkpoint, and perhaps a part that the
next run removes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from keelwright.core.digests import json_digest
from keelwright.core.errors import StorageError
from keelwright.core.files import storage_errors, sync_folder, write_atomic
from keelwright.training.config import TrainConfig
from keelwright.training.rows import EncodedRow

_PREFIX: Final = "step-"
_PART: Final = ".part"
_BYTES_HASHED: Final = 65536
"""Per tensor: enough to tell two models apart, little enough for large ones."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a training run stood."""

    step: int
    """Steps done."""
    losses: tuple[float, ...]
    weights: Mapping[str, Tensor]
    optimizer: dict[str, Any]


def fingerprint(config: TrainConfig, rows: Sequence[EncodedRow], weights: Mapping[str, Tensor]) -> str:
    """Return the digest of what a training run was started with; a checkpoint of another run is not resumed."""
    parts = hashlib.sha256()
    for name, tensor in weights.items():
        head = tensor.detach().flatten()[: _BYTES_HASHED // tensor.element_size()].cpu().contiguous()
        parts.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        parts.update(head.view(torch.uint8).numpy().tobytes())
    ids = [[row.prompt_tokens, *row.ids.tolist()] for row in rows]
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "checkpoint_every"}
    return json_digest([settings, ids, parts.hexdigest()])


def save_checkpoint(folder: Path, mark: str, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically, then remove the older ones.

    Raises:
        StorageError: The disk is full or the folder is read-only.
    """
    final = folder / f"{_PREFIX}{checkpoint.step:06d}"
    part = final.with_name(final.name + _PART)
    with storage_errors(folder):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint.weights.items()}
        save_file(weights, part / "weights.safetensors")
        torch.save(checkpoint.optimizer, part / "optimizer.pt")
        write_atomic(part / "training.json", json.dumps({"mark": mark, "losses": list(checkpoint.losses)}))
        _sync(part / "weights.safetensors")
        _sync(part / "optimizer.pt")
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        sync_folder(folder)
        for other in folder.glob(f"{_PREFIX}*"):
            if other != final:
                shutil.rmtree(other, ignore_errors=True)


def load_checkpoint(folder: Path, mark: str) -> Checkpoint | None:
    """Return the newest complete checkpoint in `folder`, or None.

    Args:
        folder: Where `save_checkpoint` wrote.
        mark: The run's fingerprint.

    Raises:
        StorageError: The checkpoint belongs to another training run.
    """
    steps = {one: one.name.removeprefix(_PREFIX) for one in folder.glob(f"{_PREFIX}*") if one.is_dir()}
    complete = sorted(one for one, number in steps.items() if number.isdigit())
    if not complete:
        return None
    newest = complete[-1]
    notes = json.loads((newest / "training.json").read_text(encoding="utf-8"))
    if notes["mark"] != mark:
        raise StorageError(
            f"'{folder}' holds a checkpoint of another training run.",
            expected=f"a run with the fingerprint {mark}",
            found=f"{notes['mark']}: other rows, settings or starting weights",
            fix="use another folder, or remove this one to start again",
        )
    return Checkpoint(
        step=int(steps[newest]),
        losses=tuple(notes["losses"]),
        weights=load_file(newest / "weights.safetensors"),
        optimizer=torch.load(newest / "optimizer.pt", weights_only=True),
    )


def _sync(path: Path) -> None:
    import os

    with path.open("rb") as stream:
        os.fsync(stream.fileno())
