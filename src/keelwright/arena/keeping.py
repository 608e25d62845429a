# SPDX-License-Identifier: Apache-2.0
"""The model that a run was for, written as training left it: a checkpoint, or the adapter that was trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from keelwright.core.files import require_new_folder, storage_errors, sync_folder, write_atomic
from keelwright.data.asking import PLAIN, Asking
from keelwright.models.dtypes import TORCH_DTYPES
from keelwright.models.loading import LoadedModel
from keelwright.models.saving import save
from keelwright.runs.places import require_place
from keelwright.training.loop import TrainResult
from keelwright.weights.parties import Party

ASKING_FILE = "keelwright-asking.json"
"""Beside a model that keeps its safety only when it is asked in a frame: the frame, readable by its owner alone."""


def require_output(out: Path) -> None:
    """Raise `StorageError` unless a model can be written to `out`."""
    require_new_folder(out, flag="--out")
    require_place(out, flag="--out")


@dataclass(frozen=True, slots=True)
class Output:
    """Where the trained model goes."""

    folder: Path
    model: LoadedModel
    party: Party
    asking: Asking = PLAIN

    def write(self, found: TrainResult) -> None:
        """Write the live model, whole or not at all; what a cut run left is written again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if found.adapter is None:
            save(self.model, self.folder, dtype=_stored_dtype(self.party))
        else:
            partial = self.folder.with_name(f"{self.folder.name}.partial")
            with storage_errors(self.folder):
                shutil.rmtree(partial, ignore_errors=True)
                found.adapter.save(partial)
                self.model.tokenizer.save_pretrained(partial)
                partial.rename(self.folder)
                sync_folder(self.folder.parent)
        if self.asking.name != PLAIN.name:
            self._write_asking()

    def notes(self) -> list[str]:
        """Return what whoever uses the model must know."""
        if self.asking.name == PLAIN.name:
            return []
        return [f"{self.asking.says} The model is safe only when asked so; the frame is in {ASKING_FILE}."]

    def _write_asking(self) -> None:
        path = self.folder / ASKING_FILE
        prompt, system = self.asking.ask("{request}", None)
        with storage_errors(path):
            write_atomic(path, json.dumps({"system": system, "prompt": prompt}, indent=2))
            path.chmod(0o600)


def _stored_dtype(party: Party) -> torch.dtype:
    """Return the dtype of most of the model's weights, as they are stored."""
    counts: dict[str, int] = {}
    for entry in party.source.entries().values():
        counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.elements
    return TORCH_DTYPES[max(counts, key=lambda name: counts[name])]
