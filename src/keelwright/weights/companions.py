# SPDX-License-Identifier: Apache-2.0
"""The files beside the weights: config, generation settings, tokenizer, chat template, licence texts."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from keelwright.core.files import write_atomic
from keelwright.core.protocols import TensorEntry
from keelwright.models.dtypes import TORCH_DTYPES
from keelwright.models.folders import TOKENIZER_FILES, read_json
from keelwright.models.headers import FLOAT_DTYPES

_GENERATION = "generation_config.json"
_MODEL_FILES = (_GENERATION, "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def copy_companions(
    model_folder: Path,
    tokenizer_folder: Path,
    out: Path,
    config_changes: Mapping[str, Any],
    generation_changes: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Copy what a loader needs beside the weights; code files and anything not listed here stay behind.

    Args:
        model_folder: Where `config.json` and the generation settings come from.
        tokenizer_folder: Where the tokenizer and the chat template come from.
        out: The output folder.
        config_changes: Keys of `config.json` that differ in the output; None removes a key, but for the dtype, where it
            says that there is nothing to say. What the model's own config says about quantisation is never copied:
            an output that is quantised says so here.
        generation_changes: Keys of `generation_config.json`, where there is one, that differ in the output; None
            removes a key.

    Returns:
        SHA-256 by file name.
    """
    files = {"config.json": _write(out / "config.json", _config(model_folder, config_changes))}
    for folder, patterns in ((model_folder, _MODEL_FILES), (tokenizer_folder, TOKENIZER_FILES)):
        for path in _matches(folder, patterns):
            name = path.relative_to(folder).as_posix()
            content = path.read_bytes()
            if name == _GENERATION and generation_changes:
                content = _changed(read_json(path, str(folder)), generation_changes)
            files[name] = _write(out / name, content)
    return files


def dominant_dtype(entries: Iterable[TensorEntry]) -> str | None:
    """Return the dtype that most weights have, as `config.json` spells it, or None without weights."""
    counts: Counter[str] = Counter()
    for entry in entries:
        if entry.dtype in FLOAT_DTYPES:
            counts[entry.dtype] += entry.elements
    if not counts:
        return None
    return str(TORCH_DTYPES[counts.most_common(1)[0][0]]).removeprefix("torch.")


def copy_tokenizer(folder: Path, out: Path) -> dict[str, str]:
    """Copy the tokenizer's files alone; return their SHA-256."""
    return {
        path.relative_to(folder).as_posix(): _write(out / path.relative_to(folder), path.read_bytes())
        for path in _matches(folder, TOKENIZER_FILES)
    }


def _matches(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _config(folder: Path, changes: Mapping[str, Any]) -> bytes:
    config = read_json(folder / "config.json", str(folder))
    config.pop("quantization_config", None)
    for key, value in changes.items():
        if value is None:
            if key != "dtype":
                config.pop(key, None)
            continue
        if key == "dtype" and "torch_dtype" in config:
            # The older spelling; a loader that finds both would have to choose.
            config["torch_dtype"] = value
            config.pop("dtype", None)
            continue
        config[key] = value
    return _as_json(config)


def _changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> bytes:
    return _as_json({key: value for key, value in {**settings, **changes}.items() if value is not None})


def _as_json(settings: Mapping[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _write(path: Path, content: bytes) -> str:
    write_atomic(path, content)
    return hashlib.sha256(content).hexdigest()
