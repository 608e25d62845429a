# SPDX-License-Identifier: Apache-2.0
"""PEFT LoRA adapters, read as what they add to each tensor, and evaluated by blocks of rows.

An adapter adds `scale * B @ A` to a weight; for a transposed layer (Conv1D) or an embedding its transpose. Both are
kept as one product `scale * left @ right` in the layout of the stored tensor, so that everything after the reading is
the same for all of them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keelwright.core.errors import ConfigError, DataError, ModelMismatchError
from keelwright.core.protocols import TensorEntry, TensorSource
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.dtypes import TORCH_DTYPES
from keelwright.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json, require_adapter
from keelwright.models.headers import FLOAT_DTYPES, read_header

# Rows are always multiplied in the same blocks, whatever range is asked for: a matrix product of another height may
# take another path through the library and end in other bits.
_BLOCK_ELEMENTS = 1 << 16

_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the base weights alone; the others store a difference from changed ones."""

_UNSUPPORTED_SWITCHES = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
)


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """What an adapter adds to one tensor: `scale * left @ right`, in the layout of the stored tensor."""

    left: Tensor
    """Shape `[rows, rank]`: `B` of a linear layer."""
    right: Tensor
    """Shape `[rank, columns]`: `A` of a linear layer."""
    scale: float
    """`alpha / rank`, or `alpha / sqrt(rank)` for rank-stabilised LoRA."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the tensor that is added to."""
        return (self.left.shape[0], self.right.shape[1])

    @property
    def rank(self) -> int:
        """Number of columns of `left`."""
        return self.left.shape[1]

    def delta(self, start_row: int = 0, stop_row: int | None = None) -> Tensor:
        """Return rows `start_row:stop_row` of what is added, in float32."""
        return self.scale * (self.left[start_row:stop_row].float() @ self.right.float())


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter by the names of the tensors that it touches."""

    text: str
    """The user's own words for it."""
    factors: Mapping[str, LoraFactors]
    full_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that the adapter replaces (`modules_to_save`, trained biases)."""

    def data_digest(self) -> str:
        """Return `sha256:` over names, scales and values."""
        digest = hashlib.sha256()
        for name, one in sorted(self.factors.items()):
            digest.update(f"{name}\x1f{one.scale!r}\x1f{one.shape}\x1f".encode())
            digest.update(one.left.float().numpy().tobytes() + one.right.float().numpy().tobytes())
        for name, tensor in sorted(self.full_tensors.items()):
            digest.update(f"{name}\x1f{tuple(tensor.shape)}\x1f".encode() + tensor.float().numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"


class AdaptedCheckpoint:
    """A `TensorSource`: a base source with adapters added lazily, in float32 and un-rounded where they touch.

    Args:
        base: The source that the adapters were made for.
        factors: What one adapter in memory adds, by tensor name; the same as one `LoraAdapter` without full tensors.
        adapters: Adapters, added in this order after `factors`.
        text: Words for error texts; by default those of the base and the adapters.

    Raises:
        ModelMismatchError: An adapter touches a tensor that the base lacks or has in another shape.
    """

    def __init__(
        self,
        base: TensorSource,
        *,
        factors: Mapping[str, LoraFactors] | None = None,
        adapters: Sequence[LoraAdapter] = (),
        text: str | None = None,
    ) -> None:
        self.base = base
        in_memory = [LoraAdapter("adapter in memory", factors)] if factors is not None else []
        self.adapters = (*in_memory, *adapters)
        self._text = text or "+".join([base.describe(), *(adapter.text for adapter in self.adapters)])
        for adapter in self.adapters:
            _require_fit(base, adapter)

    def entries(self) -> Mapping[str, TensorEntry]:
        """Return the base's entries: an adapter changes values, not the layout."""
        return self.base.entries()

    def describe(self) -> str:
        """Return `base+adapter`, in the user's words."""
        return self._text

    def config_json(self) -> dict[str, Any]:
        """Return the base's `config.json`."""
        if not isinstance(self.base, Checkpoint):
            raise TypeError(f"'{self.base.describe()}' has no config.json: it is a {type(self.base).__name__}")
        return self.base.config_json()

    def data_digest(self) -> str:
        """Return one digest over the base's digest (its description, for a base in memory) and the adapters'."""
        base = self.base.data_digest() if isinstance(self.base, Checkpoint) else self.base.describe()
        parts = "\x1f".join([base, *(adapter.data_digest() for adapter in self.adapters)])
        return f"sha256:{hashlib.sha256(parts.encode()).hexdigest()}"

    def touched(self) -> frozenset[str]:
        """Return the names of the tensors that an adapter changes."""
        return frozenset(name for adapter in self.adapters for name in (*adapter.factors, *adapter.full_tensors))

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start:stop`: as the base stores them, or in float32 where an adapter touches the tensor."""
        values = self.base.read(name, start, stop)
        for adapter in self.adapters:
            if name in adapter.full_tensors:
                values = adapter.full_tensors[name].flatten()[start:stop].to(torch.float32, copy=True)
            if name in adapter.factors:
                values = _add_rows(values.float(), adapter.factors[name], start, stop)
        return values


def read_adapter(folder: Path, text: str | None = None) -> LoraAdapter:
    """Read a PEFT LoRA folder.

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`.
        text: The user's own words for it.

    Raises:
        MissingError: No such folder, or a file is missing.
        ConfigError: The folder is a full model, or an adapter of a kind that keelwright does not add.
        UnsafeInputError: The adapter is pickled.
        DataError: The file and its settings disagree.
    """
    text = text or str(folder)
    require_adapter(folder, text)
    config = read_json(folder / ADAPTER_CONFIG, text)
    _require_plain_lora(config, text)
    tensors = _read_all(folder / ADAPTER_WEIGHTS)
    pairs: dict[str, dict[str, Tensor]] = {}
    full: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, part = split_key(key)
        if part is None:
            full[module] = tensor
        else:
            pairs.setdefault(module, {})[part] = tensor
    factors = {f"{module}.weight": _pair(module, parts, config, text) for module, parts in pairs.items()}
    if not factors and not full:
        raise DataError(
            f"The adapter '{text}' is empty.",
            expected="at least one pair of factors",
            found="no tensors",
            fix="save the adapter again",
        )
    return LoraAdapter(text, factors, full)


def factors_from_state(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, LoraFactors]:
    """Return the factors of an adapter in memory, by tensor name.

    Args:
        state: PEFT's adapter state: keys such as `base_model.model.lm_head.lora_A.weight`.
        config: The adapter's settings as `adapter_config.json` spells them.

    Raises:
        ConfigError: The adapter is of a kind that keelwright does not add.
        DataError: A pair of factors is incomplete, or trains more than factors.
    """
    text = "adapter in memory"
    _require_plain_lora(config, text)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, part = split_key(key)
        if part is None:
            raise DataError(
                f"The {text} trains '{module}' in full.",
                expected="pairs of factors only",
                found=key,
                fix="save the adapter and read it with read_adapter",
            )
        pairs.setdefault(module, {})[part] = tensor
    return {f"{module}.weight": _pair(module, parts, config, text) for module, parts in pairs.items()}


def split_key(key: str) -> tuple[str, str | None]:
    """Split a PEFT key into the module's name and the part: `A`, `B`, `embedding_A`, `embedding_B`.

    A key that is no factor gives the tensor's own name and None.
    """
    name = key.removeprefix("base_model.model.")
    match = re.fullmatch(r"(.+)\.lora_(A|B|embedding_A|embedding_B)(?:\.[^.]+)?(?:\.weight)?", name)
    if match:
        return match[1], match[2]
    return re.sub(r"\.(?:modules_to_save(?:\.default)?|base_layer|original_module)\.", ".", name), None


def _add_rows(values: Tensor, factors: LoraFactors, start: int, stop: int) -> Tensor:
    """Add elements `start:stop` of the delta to `values`, which the caller owns, in place."""
    rows, columns = factors.shape
    height = max(1, _BLOCK_ELEMENTS // max(1, columns))
    block = start // columns // height if columns else 0
    while (first := block * height * columns) < stop:
        delta = factors.delta(block * height, min(rows, (block + 1) * height)).flatten()
        low, high = max(start, first), min(stop, first + delta.numel())
        values[low - start : high - start] += delta[low - first : high - first]
        block += 1
    return values


def _require_plain_lora(config: Mapping[str, Any], text: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _unsupported(text, f"peft_type {kind}")
    for switch in _UNSUPPORTED_SWITCHES:
        if config.get(switch):
            raise _unsupported(text, "DoRA (use_dora)" if switch == "use_dora" else f"LoRA with {switch}")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise _unsupported(text, f"LoRA started with '{start}', which also changes the base weights")


def _unsupported(text: str, found: str) -> ConfigError:
    return ConfigError(
        f"The adapter '{text}' is of a kind that keelwright does not add yet.",
        expected="plain LoRA or rank-stabilised LoRA",
        found=found,
        fix="merge it with PEFT (merge_and_unload), save the full model, and pass that",
    )


def _read_all(path: Path) -> dict[str, Tensor]:
    header = read_header(path)
    raw = path.read_bytes()
    tensors = {}
    for name, stored in header.tensors.items():
        if stored.entry.dtype not in FLOAT_DTYPES:
            raise DataError(
                f"'{path}': tensor '{name}' is not stored as plain floating-point numbers.",
                expected=", ".join(sorted(FLOAT_DTYPES)),
                found=stored.entry.dtype,
                fix="save the adapter again without quantising it",
            )
        part = bytearray(raw[stored.begin : stored.end])
        dtype = TORCH_DTYPES[stored.entry.dtype]
        flat = torch.frombuffer(part, dtype=dtype) if part else torch.empty(0, dtype=dtype)
        tensors[name] = flat.view(stored.entry.shape)
    return tensors


def _pair(module: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], text: str) -> LoraFactors:
    kinds = frozenset(parts)
    if kinds not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
        raise DataError(
            f"The adapter '{text}' has half a pair for '{module}'.",
            expected="lora_A and lora_B",
            found=" and ".join(f"lora_{part}" for part in sorted(kinds)),
            fix="save the adapter again",
        )
    embedding = "embedding_A" in kinds
    small_a, small_b = (parts["embedding_A"], parts["embedding_B"]) if embedding else (parts["A"], parts["B"])
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    fits = small_a.ndim == 2 and small_b.ndim == 2 and small_a.shape[0] == small_b.shape[1] == rank
    if not fits or not isinstance(alpha, (int, float)):
        raise DataError(
            f"The adapter '{text}' has factors for '{module}' that do not fit its settings.",
            expected=f"A [{rank}, columns] and B [rows, {rank}] with a number for lora_alpha",
            found=f"A {list(small_a.shape)}, B {list(small_b.shape)}, lora_alpha {alpha}",
            fix=f"restore the {ADAPTER_CONFIG} that the factors were trained with",
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    if embedding or config.get("fan_in_fan_out"):
        small_a, small_b = small_b.T, small_a.T
    return LoraFactors(small_b.float().contiguous(), small_a.float().contiguous(), scale)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that ends `module`, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _require_fit(base: TensorSource, adapter: LoraAdapter) -> None:
    entries = base.entries()
    shapes: dict[str, tuple[int, ...]] = {name: one.shape for name, one in adapter.factors.items()}
    shapes.update({name: tuple(one.shape) for name, one in adapter.full_tensors.items()})
    strangers = [name for name in shapes if name not in entries]
    if strangers:
        shown = ", ".join(strangers[:3]) + (f" and {len(strangers) - 3} more" if len(strangers) > 3 else "")
        tied = any("lm_head" in name for name in strangers)
        raise ModelMismatchError(
            f"The adapter '{adapter.text}' was not made for '{base.describe()}'.",
            expected=f"tensors of '{base.describe()}', such as {next(iter(entries), 'none')}",
            found=f"changes to {shown}",
            fix="merge it with PEFT first: the base stores no lm_head of its own (tied)"
            if tied
            else f"pass the base that {ADAPTER_CONFIG} names",
        )
    for name, shape in shapes.items():
        if entries[name].shape != shape:
            raise ModelMismatchError(
                f"The adapter '{adapter.text}' does not fit '{base.describe()}' at '{name}'.",
                expected=f"shape {list(entries[name].shape)}",
                found=f"shape {list(shape)} from the adapter",
                fix=f"pass the base that {ADAPTER_CONFIG} names",
            )
