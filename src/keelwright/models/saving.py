# SPDX-License-Identifier: Apache-2.0
"""A live model as a checkpoint folder: whole or not at all."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch

from keelwright.core.files import storage_errors, sync_folder
from keelwright.models.loading import LoadedModel, without_messages


def save(model: LoadedModel, folder: Path, *, dtype: torch.dtype) -> Path:
    """Write weights (safetensors), settings, tokenizer and chat template; the live model stays as it is.

    Args:
        model: The model.
        folder: Where it goes; must not exist. Built as `FOLDER.partial`, renamed when complete.
        dtype: Of the stored weights.

    Raises:
        StorageError: The disk is full or the place is read-only.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    with storage_errors(folder):
        shutil.rmtree(partial, ignore_errors=True)
        with without_messages():
            copy.deepcopy(model.module).to(dtype).save_pretrained(partial)
            model.tokenizer.save_pretrained(partial)
        for file in partial.iterdir():
            # safetensors leaves its files readable by their owner alone, which an installed package must not be.
            file.chmod(0o644)
        partial.rename(folder)
        sync_folder(folder.parent)
    return folder
