# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters, read as what they do to each stored tensor, and evaluated by blocks of rows.

A LoRA adapter adds `scale * B @ A` to a weight; for a transposed layer (Conv1D) or an embedding its transpose. Both are
kept as one product `scale * left @ right` in the layout of the stored tensor, so that everything after the reading is
the same for all of them. Kinds that are no such sum (DoRA, LoHa, LoKr, IA3, OFT, experts, token rows) are `Change`s of
`adapter_changes`; how the files of each kind are read is in `adapter_kinds`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keelwright.core.errors import DataError, ModelMismatchError
from keelwright.core.protocols import TensorEntry, TensorSource
from keelwright.models.adapter_changes import Change, Dora, LoraFactors, TokenRows
from keelwright.models.adapter_kinds import Contents, read_contents, split_key
from keelwright.models.adapter_late import Late
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.dtypes import TORCH_DTYPES
from keelwright.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json, require_adapter
from keelwright.models.headers import FLOAT_DTYPES, read_header
from keelwright.models.names import require_untied, tied_tensors


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter by the names of the tensors that it touches."""

    text: str
    """The user's own words for it."""
    factors: Mapping[str, LoraFactors]
    full_tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that the adapter replaces (`modules_to_save`, trained biases)."""
    changes: Mapping[str, Change] = field(default_factory=dict)
    """What is no low-rank sum, applied after `full_tensors` and `factors`."""
    late: tuple[Late, ...] = ()
    """What cannot be known without the base's shapes; `AdaptedCheckpoint` resolves it."""
    kind: str = "LORA"
    """PEFT's own name of the kind."""
    keeps_ties: bool = False
    """Whether a tied tensor that it replaces is replaced in both places (`ensure_weight_tying`)."""

    def data_digest(self) -> str:
        """Return `sha256:` over names, scales and values."""
        digest = hashlib.sha256()
        for name, one in sorted(self.factors.items()):
            digest.update(f"{name}\x1f{one.scale!r}\x1f{one.shape}\x1f".encode())
            digest.update(one.left.float().numpy().tobytes() + one.right.float().numpy().tobytes())
        for name, tensor in sorted(self.full_tensors.items()):
            digest.update(f"{name}\x1f{tuple(tensor.shape)}\x1f".encode() + tensor.float().numpy().tobytes())
        for name, change in sorted(self.changes.items()):
            digest.update(f"{name}\x1f{type(change).__name__}\x1f{change.settings()}\x1f{change.shape}\x1f".encode())
            for tensor in change.tensors():
                digest.update(f"{tuple(tensor.shape)}\x1f".encode() + tensor.float().contiguous().numpy().tobytes())
        for late in self.late:
            for name, tensor in late.tensors():
                digest.update(f"{name}\x1f{tuple(tensor.shape)}\x1f".encode())
                digest.update(tensor.float().contiguous().numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"


class AdaptedCheckpoint:
    """A `TensorSource`: a base source with adapters added lazily, in float32 and un-rounded where they touch.

    Args:
        base: The source that the adapters were made for.
        factors: What one adapter in memory adds, by tensor name; the same as one `LoraAdapter` without full tensors.
        adapters: Adapters, added in this order after `factors`.
        text: Words for error texts; by default those of the base and the adapters.

    Raises:
        ModelMismatchError: An adapter touches a tensor that the base lacks, has in another shape, or ties to another.
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
        self.adapters = tuple(_bound(base, adapter) for adapter in (*in_memory, *adapters))
        self._text = text or "+".join([base.describe(), *(adapter.text for adapter in self.adapters)])
        self._remembered: dict[tuple[int, str], Tensor] = {}
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
        return frozenset(
            name for one in self.adapters for names in (one.factors, one.full_tensors, one.changes) for name in names
        )

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start:stop`: as the base stores them, or in float32 where an adapter touches the tensor."""
        return self._read(name, start, stop, len(self.adapters))

    def _read(self, name: str, start: int, stop: int, count: int, *, last_change: bool = True) -> Tensor:
        """Return elements with the first `count` adapters on, the last one's change (not its sum) on request."""
        values = self.base.read(name, start, stop)
        for index, adapter in enumerate(self.adapters[:count]):
            if name in adapter.full_tensors:
                values = adapter.full_tensors[name].flatten()[start:stop].to(torch.float32, copy=True)
            if name in adapter.factors:
                values = adapter.factors[name].apply(values.float(), start, stop)
            if name in adapter.changes and (last_change or index + 1 < count):
                below = _Below(self, name, index)
                values = adapter.changes[name].apply(values.float(), start, stop, below)
        return values


@dataclass(frozen=True, slots=True)
class _Below:
    """What lies under the change that one adapter makes to one tensor."""

    source: AdaptedCheckpoint
    name: str
    index: int

    def base(self, start: int, stop: int) -> Tensor:
        return self.source.base.read(self.name, start, stop).float()

    def before(self, start: int, stop: int) -> Tensor:
        return self.source._read(self.name, start, stop, self.index + 1, last_change=False).float()

    def remember(self, make: Callable[[], Tensor]) -> Tensor:
        key = (self.index, self.name)
        if key not in self.source._remembered:
            self.source._remembered[key] = make()
        return self.source._remembered[key]


def read_adapter(folder: Path, text: str | None = None) -> LoraAdapter:
    """Read a PEFT adapter folder.

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
    found = read_contents(config, lambda: _read_all(folder / ADAPTER_WEIGHTS), text)
    if not any((found.factors, found.full, found.changes, found.late)):
        raise DataError(
            f"The adapter '{text}' is empty.",
            expected="at least one pair of factors",
            found="no tensors",
            fix="save the adapter again",
        )
    return LoraAdapter(
        text,
        found.factors,
        found.full,
        found.changes,
        tuple(found.late),
        str(config.get("peft_type")),
        bool(config.get("ensure_weight_tying")),
    )


def factors_from_state(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, LoraFactors]:
    """Return the factors of an adapter in memory, by tensor name.

    Args:
        state: PEFT's adapter state: keys such as `base_model.model.lm_head.lora_A.weight`.
        config: The adapter's settings as `adapter_config.json` spells them.

    Raises:
        ConfigError: The adapter is of a kind that keelwright does not add.
        DataError: A pair of factors is incomplete, or the adapter does more than add low-rank sums.
    """
    text = "adapter in memory"
    found: Contents = read_contents(config, lambda: dict(state), text)
    other = next(iter((*found.full, *found.changes)), None) or ("its base's shapes" if found.late else None)
    if other is not None:
        raise DataError(
            f"The {text} trains '{other}' in full." if found.full else f"The {text} is no low-rank sum at '{other}'.",
            expected="pairs of factors only",
            found=other,
            fix="save the adapter and read it with read_adapter",
        )
    return found.factors


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


def _bound(base: TensorSource, adapter: LoraAdapter) -> LoraAdapter:
    """Return the adapter with everything resolved that needs the base's shapes."""
    entries = base.entries()

    def turned(name: str, one: LoraFactors) -> LoraFactors:
        # PEFT decides by the type of each layer, and keeps one setting for all of them: where the layers of an
        # adapter differ, only the shapes can tell.
        wrong = name in entries and one.shape != entries[name].shape and one.shape[::-1] == entries[name].shape
        return one.transposed() if wrong else one

    factors = {name: turned(name, one) for name, one in adapter.factors.items()}
    changes = dict(adapter.changes)
    for late in adapter.late:
        for name, change in late.bind(base).items():
            if isinstance(change, LoraFactors):
                factors[name] = change
            else:
                changes[name] = change
    for name, change in changes.items():
        if isinstance(change, Dora) and turned(name, change.factors) is not change.factors:
            changes[name] = change.transposed()
    full = dict(adapter.full_tensors)
    if isinstance(base, Checkpoint):
        config = base.config_json()
        kept = {name for name, change in changes.items() if isinstance(change, TokenRows)}
        for alias, stored in tied_tensors(config).items():
            both = alias in full and stored in full and torch.equal(full[alias], full[stored])
            one = (alias in full) != (stored in full) and adapter.keeps_ties
            if both or one:
                # It stays one tensor, under the name that the base stores.
                values = [full.pop(name) for name in (alias, stored) if name in full]
                full[stored if stored in entries else alias] = values[0]
                kept |= {alias, stored}
        # Rows of a tied embedding are replaced in both places, as in PEFT; anything else would untie the two.
        require_untied(config, adapter.text, {*factors, *full, *changes} - kept)
    return replace(adapter, factors=factors, full_tensors=full, changes=changes, late=())


def _require_fit(base: TensorSource, adapter: LoraAdapter) -> None:
    entries = base.entries()
    shapes: dict[str, tuple[int, ...]] = {name: one.shape for name, one in adapter.factors.items()}
    shapes.update({name: tuple(one.shape) for name, one in adapter.full_tensors.items()})
    shapes.update({name: one.shape for name, one in adapter.changes.items()})
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


__all__ = [
    "AdaptedCheckpoint",
    "LoraAdapter",
    "LoraFactors",
    "factors_from_state",
    "read_adapter",
    "split_key",
]
