# SPDX-License-Identifier: Apache-2.0
"""A model's tensors, whatever form the model was named in; and what can be said of any `TensorSource`."""

from __future__ import annotations

from collections import Counter

import torch

from keelwright.core.protocols import TensorSource
from keelwright.models.adapters import AdaptedCheckpoint, read_adapter
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.dtypes import TORCH_DTYPES
from keelwright.models.float8 import open_checkpoint
from keelwright.models.headers import FLOAT_DTYPES, tensor_bytes
from keelwright.models.refs import LocalModel, ModelRef, resolve

_CHUNK = 1 << 20
"""Elements per read where every value is looked at."""


def open_source(model: ModelRef | LocalModel, *, offline: bool = False) -> Checkpoint | AdaptedCheckpoint:
    """Return the model's tensors: a `Checkpoint`, or an `AdaptedCheckpoint` where adapters are named.

    Args:
        model: A reference, resolved here, or a model whose files are known. Live references are refused.
        offline: Never use the network.

    Raises:
        MissingError, OfflineError: The files cannot be had.
        ConfigError, DataError, UnsafeInputError: They are not what was meant.
        ModelMismatchError: An adapter was not made for the base, or changes one of two tied tensors.
    """
    local = resolve(model, offline=offline) if isinstance(model, ModelRef) else model
    base = open_base(local)
    if not local.adapter_folders:
        return base
    adapters = [read_adapter(*pair) for pair in zip(local.adapter_folders, local.ref.adapters, strict=True)]
    return AdaptedCheckpoint(base, adapters=adapters, text=local.ref.text)


def open_base(local: LocalModel) -> Checkpoint:
    """Return the tensors of the model without its adapters."""
    whole = not local.adapter_folders
    return open_checkpoint(local.folder, local.ref.text if whole else local.ref.place)


def stored_dtype(source: TensorSource) -> torch.dtype:
    """Return the floating-point dtype that most of the source's bytes are stored in; float32 where there is none."""
    sizes: Counter[str] = Counter()
    for entry in source.entries().values():
        if entry.dtype in FLOAT_DTYPES:
            sizes[entry.dtype] += tensor_bytes(entry)
    return TORCH_DTYPES[sizes.most_common(1)[0][0]] if sizes else torch.float32


def first_nonfinite(source: TensorSource) -> tuple[str, int] | None:
    """Return the first tensor that holds NaN or infinity, with the index into the flattened tensor; None is good."""
    for name, entry in source.entries().items():
        if entry.dtype not in FLOAT_DTYPES:
            continue
        for start in range(0, entry.elements, _CHUNK):
            bad = ~torch.isfinite(source.read(name, start, min(start + _CHUNK, entry.elements)))
            if bad.any():
                return name, start + int(bad.nonzero()[0, 0])
    return None
