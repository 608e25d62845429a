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
from dataclasses import dataclass, field
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
from keelwright.training.sharding import whole

_PREFIX: Final = "step-"
_PART: Final = ".part"
_STATE: Final = "//state//"
"""Before the names of a method's own tensors; no weight is called so."""
_BYTES_HASHED: Final = 65536
"""Per tensor: enough to tell two models apart, little enough for large ones."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a training run stood."""

    step: int
    """Steps done."""
    losses: tuple[float, ...]
    """Of each step so far."""
    weights: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    state: Mapping[str, Tensor] = field(default_factory=dict)
    """What the method keeps beside weights and optimiser."""
    log: tuple[Mapping[str, float], ...] = ()
    """Further figures of each step so far."""


def fingerprint(
    config: TrainConfig,
    feeds: Mapping[str, Sequence[EncodedRow]],
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
) -> str:
    """Return the digest of what a training run was started with; a checkpoint of another run is not resumed.

    Args:
        config: Of the loop.
        feeds: Encoded rows by name.
        weights: What is trained, as it is before the first step.
        settings: The method's name and settings.
    """
    parts = hashlib.sha256()
    for name, tensor in weights.items():
        head = whole(tensor).flatten()[: _BYTES_HASHED // tensor.element_size()].cpu().contiguous()
        parts.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        parts.update(head.view(torch.uint8).numpy().tobytes())
    ids = {name: [[row.prompt_tokens, *row.ids.tolist()] for row in rows] for name, rows in feeds.items()}
    loop = {key: value for key, value in dataclasses.asdict(config).items() if key != "checkpoint_every"}
    return json_digest([loop, dict(settings), ids, parts.hexdigest()])


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
        kept = {**checkpoint.weights, **{f"{_STATE}{name}": one for name, one in checkpoint.state.items()}}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in kept.items()}
        save_file(tensors, part / "weights.safetensors")
        torch.save(checkpoint.optimizer, part / "optimizer.pt")
        notes = {"mark": mark, "losses": list(checkpoint.losses), "log": [dict(one) for one in checkpoint.log]}
        write_atomic(part / "training.json", json.dumps(notes))
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
    tensors = load_file(newest / "weights.safetensors")
    return Checkpoint(
        step=int(steps[newest]),
        losses=tuple(notes["losses"]),
        weights={name: one for name, one in tensors.items() if not name.startswith(_STATE)},
        optimizer=torch.load(newest / "optimizer.pt", weights_only=True),
        state={name.removeprefix(_STATE): one for name, one in tensors.items() if name.startswith(_STATE)},
        log=tuple(notes.get("log", ())),
    )


def _sync(path: Path) -> None:
    import os

    with path.open("rb") as stream:
        os.fsync(stream.fileno())
