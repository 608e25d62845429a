# SPDX-License-Identifier: Apache-2.0
"""Models in memory: loaded from safetensors, without remote code, with every tensor accounted for."""

from __future__ import annotations

import contextlib
import logging
import pickle
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from keelwright.core.errors import ConfigError, DataError, ModelMismatchError, UnsafeInputError
from keelwright.models.adapters import AdaptedCheckpoint
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.configs import BAD_SETTINGS, bad_settings, parse_config, require_language_model
from keelwright.models.float8 import Float8Checkpoint, whole_state
from keelwright.models.folders import INDEX, PICKLES, WEIGHTS, has_tokenizer, read_json, require_unquantised
from keelwright.models.headers import FLOAT_DTYPES, tensor_bytes
from keelwright.models.hub import commit_of
from keelwright.models.memory import require_memory
from keelwright.models.names import name_map
from keelwright.models.refs import LocalModel, ModelRef, parse_ref, resolve
from keelwright.models.sources import open_base, open_source, stored_dtype

_GENERATION = "generation_config.json"
_CHUNK = 1 << 20
"""Elements per read where an adapter is added into a module."""


@dataclass
class LoadedModel:
    """A model in memory with its tokenizer."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """The user's own words for it."""
    revision: str
    """Commit of a hub model, else a digest of the weights."""


def load(
    ref: ModelRef | LoadedModel | str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    merge_adapters: bool = True,
) -> LoadedModel:
    """Load a model for generation, in evaluation mode.

    Args:
        ref: The model. A live one is returned as it is.
        device: `cpu`, `cuda`, `cuda:1` or `auto` (a GPU where there is one).
        dtype: Dtype of the weights; by default the one they are stored in, so that a trial in memory equals the
            checkpoint that is written afterwards.
        offline: Never use the network.
        allow_pickle: Also open pickled weights, as tensors only.
        merge_adapters: Add adapters into the weights, in float32 and rounded once. If not, PEFT applies them.

    Raises:
        MissingError, OfflineError: The model's files cannot be had.
        UnsafeInputError: Pickled weights without `allow_pickle`, or a model that needs code of its own.
        DataError, ConfigError: The folder is not a usable model.
        ModelMismatchError: The weights do not fit the architecture.
        ResourceError: Too little memory.
    """
    ref = parse_ref(ref)
    if ref.live is not None:
        return ref.live
    place = find_device(device)
    local = resolve(ref, offline=offline)
    if allow_pickle and not local.adapter_folders and _is_pickled(local.folder):
        return _load_pickled(local, place, dtype)
    # Every header is checked here, before transformers touches a file.
    source = open_source(local)
    base = open_base(local)
    require_language_model(base.config_json(), base.describe())
    dtype = dtype or stored_dtype(base)
    is_float8 = isinstance(base, Float8Checkpoint)
    # Dequantised weights are in memory before the module that they fill.
    require_memory(
        (2 if is_float8 else 1) * _loaded_bytes(base, dtype), f"Loading '{ref.text}' as {dtype}", device=place
    )
    tokenizer = load_tokenizer(local)
    module = _dequantised(base, dtype) if is_float8 else _from_pretrained(local.folder, base.describe(), dtype)
    if isinstance(source, AdaptedCheckpoint):
        module = _merge(module, source) if merge_adapters else _attach(module, local.adapter_folders)
    module.to(place).eval()
    revision = commit_of(local.folder) if isinstance(source, Checkpoint) else None
    return LoadedModel(module, tokenizer, ref.text, revision or source.data_digest())


def load_tokenizer(local: LocalModel) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model on this disk, with its chat template.

    Raises:
        DataError: There is none, or it cannot be read.
        UnsafeInputError: It needs code of its own.
    """
    folder = local.tokenizer_folder
    if not has_tokenizer(folder):
        raise DataError(
            f"'{local.ref.text}' has no tokenizer.",
            expected=f"tokenizer.json and tokenizer_config.json in {folder}",
            found="weights without a tokenizer",
            fix="copy the tokenizer files from the model it was made from",
        )
    try:
        with without_messages():
            return _tokenizer_kind(folder, local.ref.text).from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise DataError(
            f"The tokenizer of '{local.ref.text}' cannot be read.",
            expected="a tokenizer that transformers knows, without code of its own",
            found=_reason(error),
            fix="copy the tokenizer files again from where the model came from",
        ) from error


def wrap_module(module: nn.Module) -> LoadedModel:
    """Return a bare transformers module as a `LoadedModel`, with the tokenizer of the folder it was loaded from.

    Raises:
        ConfigError: It is no transformers model, or its tokenizer is not on this disk.
    """
    if not isinstance(module, PreTrainedModel):
        raise ConfigError(
            f"A {type(module).__name__} is not a model that keelwright can use.",
            expected="a transformers PreTrainedModel, or a LoadedModel",
            found=type(module).__name__,
            fix="pass keelwright.models.loading.LoadedModel(module, tokenizer, name, revision)",
        )
    folder = Path(module.name_or_path) if module.name_or_path else None
    if folder is None or not folder.is_dir():
        raise ConfigError(
            "A module alone has no tokenizer.",
            expected="a module loaded from a folder that still exists",
            found=f"name_or_path '{module.name_or_path}'",
            fix="pass keelwright.models.loading.LoadedModel(module, tokenizer, name, revision)",
        )
    name = f"live {type(module).__name__}"
    tokenizer = load_tokenizer(LocalModel(ModelRef(name, "folder", str(folder)), folder))
    return LoadedModel(module, tokenizer, name, "live")


def find_device(device: str) -> torch.device:
    """Return the device that a `--device` value names.

    Raises:
        ConfigError: There is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    known = place is not None and place.type in {"cpu", "cuda"}
    if place is None or not known or (place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            f"There is no device '{device}' here.",
            expected="auto, cpu" + "".join(f", cuda:{index}" for index in range(torch.cuda.device_count())),
            found=device,
            fix="choose one of those",
        )
    return place


def _tokenizer_kind(folder: Path, text: str) -> type[AutoTokenizer] | type[PreTrainedTokenizerFast]:
    """Return the class that loads the folder's tokenizer.

    Where the folder says that tokenizer.json is all there is, it is: AutoTokenizer would rebuild the tokenizer of some
    architectures (Qwen2) from its vocabulary alone, and lose its rules.
    """
    settings = folder / "tokenizer_config.json"
    declared = read_json(settings, text).get("tokenizer_class") if settings.is_file() else None
    plain = declared in {"TokenizersBackend", "PreTrainedTokenizerFast"} and (folder / "tokenizer.json").is_file()
    return PreTrainedTokenizerFast if plain else AutoTokenizer


def _from_pretrained(folder: Path, text: str, dtype: torch.dtype, *, use_safetensors: bool = True) -> PreTrainedModel:
    try:
        with without_messages():
            module, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=use_safetensors,
                weights_only=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except pickle.UnpicklingError as error:
        raise UnsafeInputError(
            f"The pickled weights of '{text}' hold more than tensors.",
            expected="tensors only",
            found=_reason(error),
            fix="do not use this file unless you can convert it to safetensors in a place that you can afford to lose",
        ) from error
    except BAD_SETTINGS as error:
        raise bad_settings(text, error) from error
    _require_complete(report, type(module).__name__, text)
    return module


def _dequantised(base: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Return a module filled with the weights that an F8 checkpoint stands for.

    Left to itself transformers would choose by the machine: keep F8 on some GPUs, dequantise elsewhere, or want a
    package that is not installed. A trial in memory must hold the bits that a repair would write.
    """
    text = base.describe()
    config = parse_config(base.config_json(), text)
    if config is None:
        raise TypeError("the architecture is known: this was checked")
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config._name_or_path = str(base.folder)
    try:
        with without_messages():
            module, report = (kind[0] if isinstance(kind, tuple) else kind).from_pretrained(
                None, config=config, state_dict=whole_state(base, dtype), dtype=dtype, output_loading_info=True
            )
            if (base.folder / _GENERATION).is_file():
                module.generation_config = GenerationConfig.from_pretrained(base.folder, local_files_only=True)
    except BAD_SETTINGS as error:
        raise bad_settings(text, error) from error
    module.name_or_path = str(base.folder)
    _require_complete(report, type(module).__name__, text)
    loaded: PreTrainedModel = module
    return loaded


def _require_complete(report: Mapping[str, Any], architecture: str, text: str) -> None:
    """Raise unless every parameter got its values and every tensor its parameter."""
    mismatched = [str(one[0] if isinstance(one, tuple) else one) for one in report["mismatched_keys"]]
    kinds = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(report["unexpected_keys"]),
        "of another shape": sorted(mismatched),
    }
    wrong = {kind: names for kind, names in kinds.items() if names}
    if wrong:
        shown = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            for kind, names in wrong.items()
        )
        raise ModelMismatchError(
            f"The weights of '{text}' do not fit its config.json.",
            expected=f"the tensors of {architecture}",
            found=shown,
            fix="copy config.json and the weights again from the same place",
        )


def _merge(module: PreTrainedModel, source: AdaptedCheckpoint) -> PreTrainedModel:
    """Write what the source holds into the parameters that its adapters touch, rounding once."""
    touched = source.touched()
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for parameter, name in name_map(module, source).items():
            if name not in touched:
                continue
            flat = parameters[parameter].view(-1)
            for start in range(0, flat.numel(), _CHUNK):
                stop = min(start + _CHUNK, flat.numel())
                flat[start:stop] = source.read(name, start, stop).to(flat.dtype)
    return module


def _attach(module: PreTrainedModel, adapter_folders: tuple[Path, ...]) -> PreTrainedModel:
    """Let PEFT apply the adapters beside the weights."""
    from peft import PeftModel

    names = [f"adapter{index}" for index in range(len(adapter_folders))]
    wrapped = PeftModel.from_pretrained(module, str(adapter_folders[0]), adapter_name=names[0])
    for name, folder in zip(names[1:], adapter_folders[1:], strict=True):
        wrapped.load_adapter(str(folder), adapter_name=name)
    wrapped.base_model.set_adapter(names)
    return wrapped


def _is_pickled(folder: Path) -> bool:
    has_safetensors = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    return not has_safetensors and any(path for pattern in PICKLES for path in folder.glob(pattern))


def _load_pickled(local: LocalModel, place: torch.device, dtype: torch.dtype | None) -> LoadedModel:
    text = local.ref.text
    config = read_json(local.folder / "config.json", text)
    require_unquantised(local.folder, config, text)
    require_language_model(config, text)
    files = sorted(path for pattern in PICKLES for path in local.folder.glob(pattern))
    require_memory(2 * sum(path.stat().st_size for path in files), f"Loading '{text}'", device="cpu")
    stored = config.get("dtype") or config.get("torch_dtype")
    if dtype is None:
        dtype = getattr(torch, stored) if isinstance(stored, str) and hasattr(torch, stored) else torch.float32
    module = _from_pretrained(local.folder, text, dtype, use_safetensors=False)
    module.to(place).eval()
    sizes = ",".join(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files)
    return LoadedModel(module, load_tokenizer(local), text, commit_of(local.folder) or f"files:{sizes}")


def _loaded_bytes(base: Checkpoint, dtype: torch.dtype) -> int:
    entries = base.entries().values()
    floats = sum(entry.elements for entry in entries if entry.dtype in FLOAT_DTYPES)
    return floats * dtype.itemsize + sum(tensor_bytes(one) for one in entries if one.dtype not in FLOAT_DTYPES)


def _reason(error: Exception) -> str:
    """Return the line of torch's long advice that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else type(error).__name__)[:200]


@contextlib.contextmanager
def without_messages() -> Iterator[None]:
    """Keep transformers from printing: what matters is raised as an error by us."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
