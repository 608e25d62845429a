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
from keelwright.models.loading import LoadedModel
from keelwright.models.saving import save
from keelwright.runs.places import require_place
from keelwright.training.loop import TrainResult

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
    dtype: torch.dtype
    """Of the weights that are written."""
    asking: Asking = PLAIN

    def write(self, found: TrainResult) -> None:
        """Write the live model, whole or not at all; what a cut run left is written again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if found.adapter is None:
            save(self.model, self.folder, dtype=self.dtype)
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
