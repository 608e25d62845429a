# SPDX-License-Identifier: Apache-2.0
"""What a model folder holds, told from its files' names; and the error for each folder that is not what was meant."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from keelwright.core.errors import ConfigError, DataError, KeelwrightError, MissingError, UnsafeInputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What belongs to a tokenizer, its chat template and its processor; patterns below a model's folder."""


def require_checkpoint(folder: Path, text: str) -> None:
    """Raise unless `folder` holds a full model as safetensors.

    Args:
        folder: The folder on disk.
        text: The user's own words for it.

    Raises:
        MissingError: There is no such folder, or it holds no weights.
        ConfigError: It is an adapter.
        UnsafeInputError: Its weights are pickled.
        DataError: Its weights are in a format that keelwright does not read.
    """
    require_folder(folder, text)
    if is_adapter(folder):
        raise _adapter_as_model(folder, text)
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return
    raise _no_weights(folder, text, wanted=f"{WEIGHTS} or {INDEX}")


def require_adapter(folder: Path, text: str) -> None:
    """Raise unless `folder` holds a PEFT adapter as safetensors; the same errors as `require_checkpoint`."""
    require_folder(folder, text)
    if (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_WEIGHTS).is_file():
        return
    if not is_adapter(folder) and ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()):
        raise ConfigError(
            f"'{text}' is a full model, not an adapter.",
            expected=f"a folder with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} after the '+'",
            found=shown_files(folder),
            fix=f"pass it on its own: {text}",
        )
    raise _no_weights(folder, text, wanted=f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")


def require_folder(folder: Path, text: str) -> None:
    """Raise `MissingError` unless `folder` is a folder."""
    if folder.is_dir():
        return
    is_file = folder.is_file()
    raise MissingError(
        f"'{text}' is a file, not a model folder." if is_file else f"There is no such folder: '{text}'.",
        expected="a folder with config.json and safetensors weights, or a hub id such as org/name",
        found="a file" if is_file else "nothing at that path",
        fix=f"pass the folder that holds it: {folder.parent}" if is_file else "check the spelling of the path",
    )


def is_adapter(folder: Path) -> bool:
    """Tell whether the folder says that it holds a PEFT adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def has_tokenizer(folder: Path) -> bool:
    """Tell whether the folder holds a tokenizer of its own."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def shown_files(folder: Path) -> str:
    """Return the names in a folder, few enough to print."""
    names = sorted(child.name for child in folder.iterdir())
    if not names:
        return "an empty folder"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def read_json(path: Path, text: str) -> dict[str, Any]:
    """Read a JSON object from a model folder.

    Args:
        path: The file.
        text: The user's own words for the model.

    Raises:
        MissingError: There is no such file.
        DataError: It is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingError(
            f"'{text}' has no {path.name}.",
            expected=str(path),
            found=shown_files(path.parent) if path.parent.is_dir() else "no such folder",
            fix=f"copy {path.name} from where the model came from",
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"'{path}' is not JSON.",
            expected="a JSON object",
            found=str(error),
            fix="download or copy the file again",
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"'{path}' is not a JSON object.",
            expected="a JSON object",
            found=type(value).__name__,
            fix="download or copy the file again",
        )
    return value


def require_inside(name: str, listed_in: Path) -> None:
    """Raise `UnsafeInputError` when a file name in an index would leave the index's folder."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.anchor or ".." in windows.parts or not name:
        raise UnsafeInputError(
            f"'{listed_in}' names a file outside its folder.",
            expected="file names inside the model's folder",
            found=name or "an empty name",
            fix="do not use this checkpoint unless you wrote the index yourself; then name the file only",
        )


def require_unquantised(folder: Path, config: Mapping[str, Any], text: str) -> None:
    """Raise `DataError` when the weights are stored quantised, naming the model they were made from where known."""
    quantisation = config.get("quantization_config")
    if not quantisation:
        return
    method = quantisation.get("quant_method", "unnamed") if isinstance(quantisation, dict) else "unnamed"
    parent = _parent(folder, config)
    raise DataError(
        f"'{text}' is quantised; its weights are packed and cannot be compared or edited.",
        expected="weights stored as F32, F16 or BF16, or as F8 with scales",
        found=f"quantization_config with method '{method}'",
        fix=f"use the unquantised model{f' {parent}' if parent else ' that it was made from'}",
    )


def float8_settings(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `quantization_config` of a checkpoint whose weights are 8-bit floats with scales, else None.

    Args:
        config: `config.json`.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return None
    method = settings.get("quant_method")
    if method == "fp8":
        plain = settings.get("expert_dtype", "fp8") == "fp8"
    elif method == "modelopt":
        plain = settings.get("quant_algo") in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
    elif method == "compressed-tensors":
        plain = _only_float8(settings)
    else:
        plain = method == "fbgemm_fp8"
    return settings if plain else None


def _only_float8(settings: Mapping[str, Any]) -> bool:
    """Tell whether every group of compressed-tensors' settings stores its weights as unpacked 8-bit floats."""
    groups = settings.get("config_groups")
    sparsity = settings.get("sparsity_config") or {}
    if not isinstance(groups, dict) or not groups or sparsity.get("format", "dense") != "dense":
        return False
    weights = [group.get("weights") if isinstance(group, dict) else None for group in groups.values()]
    return all(isinstance(one, dict) and one.get("type") == "float" and one.get("num_bits") == 8 for one in weights)


def _parent(folder: Path, config: Mapping[str, Any]) -> str | None:
    card = folder / "README.md"
    if card.is_file():
        parts = card.read_text(encoding="utf-8", errors="replace").split("---")
        try:
            front = yaml.safe_load(parts[1]) if len(parts) > 2 else None
        except yaml.YAMLError:
            front = None
        base = front.get("base_model") if isinstance(front, dict) else None
        if base:
            return str(base[0] if isinstance(base, list) else base)
    name = config.get("_name_or_path")
    return str(name) if name else None


def _adapter_as_model(folder: Path, text: str) -> ConfigError:
    base = read_json(folder / ADAPTER_CONFIG, text).get("base_model_name_or_path") or "BASE"
    return ConfigError(
        f"'{text}' is an adapter, not a full model.",
        expected="a folder with config.json and all weights",
        found=f"{ADAPTER_CONFIG}, made for {base}",
        fix=f"pass it as base+adapter: {base}+{text}",
    )


def _no_weights(folder: Path, text: str, *, wanted: str) -> KeelwrightError:
    if any(path for pattern in PICKLES for path in folder.glob(pattern)):
        pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        return UnsafeInputError(
            f"The weights of '{text}' are pickled; opening a pickle can run code.",
            expected=wanted,
            found=", ".join(pickled[:3]),
            fix="convert them to safetensors; if you trust the source, `keelwright audit --allow-pickle` opens them",
        )
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf:
        return DataError(
            f"'{text}' holds GGUF weights, which are packed.",
            expected=wanted,
            found=", ".join(gguf[:3]),
            fix="use the safetensors model that the GGUF file was made from",
        )
    return MissingError(
        f"'{text}' is not a model folder.",
        expected=wanted,
        found=shown_files(folder),
        fix="pass the folder that holds the weights",
    )
