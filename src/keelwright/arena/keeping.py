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


RUN_FILE = "keelwright-run.json"
"""Beside a model: which run wrote it, so that the same run may write it again after it was cut off, and no other."""


def require_free(out: Path, mark: str) -> None:
    """Raise `StorageError` unless `out` is free, or holds what the run with this mark wrote."""
    known = out / RUN_FILE
    if known.is_file() and json.loads(known.read_text(encoding="utf-8")).get("run") == mark:
        return
    require_new_folder(out, flag="--out")


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
    mark: str = ""
    """Of the run."""

    def write(self, found: TrainResult) -> None:
        """Write the live model, whole or not at all; what this very run wrote before it was cut off is replaced.

        Raises:
            StorageError: The folder holds something else by now, the disk is full or the place is read-only.
        """
        require_free(self.folder, self.mark)
        fresh = self.folder.with_name(f"{self.folder.name}.new")
        with storage_errors(self.folder):
            shutil.rmtree(fresh, ignore_errors=True)
        if found.adapter is None:
            save(self.model, fresh, dtype=self.dtype)
        else:
            with storage_errors(self.folder):
                found.adapter.save(fresh)
                self.model.tokenizer.save_pretrained(fresh)
        with storage_errors(self.folder):
            if self.asking.name != PLAIN.name:
                self._write_asking(fresh / ASKING_FILE)
            write_atomic(fresh / RUN_FILE, json.dumps({"run": self.mark}))
            shutil.rmtree(self.folder, ignore_errors=True)
            fresh.rename(self.folder)
            sync_folder(self.folder.parent)

    def notes(self) -> list[str]:
        """Return what whoever uses the model must know."""
        if self.asking.name == PLAIN.name:
            return []
        return [f"{self.asking.says} The model is safe only when asked so; the frame is in {ASKING_FILE}."]

    def _write_asking(self, path: Path) -> None:
        prompt, system = self.asking.ask("{request}", None)
        write_atomic(path, json.dumps({"system": system, "prompt": prompt}, indent=2))
        path.chmod(0o600)
