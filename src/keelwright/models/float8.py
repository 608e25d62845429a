# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in 8-bit floating point, shown as the bfloat16 weights that they stand for.

An F8 weight is stored with scales: one for the tensor, one per row, or one per block. The weight is the stored number
times its scale, whatever the scale is called: the `inv` of `weight_scale_inv` says that it is the inverse of the factor
that the weight was multiplied with when it was quantised. Scales are hidden; a read gives `stored * scale` in float32,
not rounded; what is written in bfloat16 is therefore rounded once.

Read are fine-grained F8 (`quant_method: fp8`, also per tensor), FBGEMM, compressed-tensors with 8-bit floats, and
ModelOpt with F8. Without scales, and with settings that name none, F8 numbers are what they say.

Source:
    DeepSeek-AI: DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.3 (blocks of 128 x 128). The conventions of
    names and shapes are those of transformers 5.23 (`Fp8Dequantize`), which a test compares with. It takes the size of
    a block from the grid of scales and so wants shapes that the grid divides; ours takes it from the settings where the
    grid agrees with them, so that the last block of a row or column may be smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keelwright.core.errors import DataError, NumericalError
from keelwright.core.protocols import TensorEntry, TensorSource
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.dtypes import TORCH_DTYPES
from keelwright.models.folders import float8_settings
from keelwright.models.headers import FLOAT8_DTYPES, FLOAT_DTYPES

SHOWN_DTYPE = "BF16"
"""What a dequantised weight is written as, unless another dtype is asked for."""

_SCALE_DTYPES = frozenset({*FLOAT_DTYPES, "F8_E8M0", "U8"})
# The exponent bias of E8M0: the byte b stands for 2 ** (b - 127), and 255 for NaN.
_E8M0_BIAS = 127
_E8M0_NAN = 255
# What stands beside a quantised weight and is no weight: settings of activations and caches.
_ACTIVATION_ENDS = (
    "input_scale",
    "input_scale_inv",
    "input_scale_ub",
    "activation_scale",
    "act_scale",
    "qscale_act",
    "output_scale",
    "k_scale",
    "v_scale",
    "q_scale",
)
_ZERO_POINT = "_zero_point"
_REMEMBERED_SCALES = 8


@dataclass(frozen=True, slots=True)
class Scaling:
    """Where the scales of one F8 weight are, and which part of the weight each of them covers."""

    weight: TensorEntry
    """As it is stored."""
    scale: TensorEntry
    """As it is stored."""
    grid: tuple[int, ...]
    """Number of blocks along each axis of the weight."""
    block: tuple[int, ...]
    """Elements per block along each axis; the last block may be smaller."""


class Float8Checkpoint(Checkpoint):
    """A checkpoint whose F8 weights are shown as bfloat16 and read in float32, without their scales.

    Args:
        folder: The folder.
        text: The user's own words for it, for error texts.

    Raises:
        DataError: A scale is missing, or does not fit its weight; and whatever a `Checkpoint` raises.
    """

    def __init__(self, folder: Path, text: str | None = None) -> None:
        super().__init__(folder, text)
        stored = super().entries()
        self.settings = float8_settings(super().config_json())
        """The `quantization_config` of the checkpoint, or None."""
        self.scalings = find_scalings(stored, self.settings, self.describe())
        """By name of the weight."""
        hidden = _hidden(stored, self.scalings)
        self._shown = {
            name: TensorEntry(name, SHOWN_DTYPE, entry.shape) if entry.dtype in FLOAT8_DTYPES else entry
            for name, entry in stored.items()
            if name not in hidden
        }
        self._scales: dict[str, Tensor] = {}
        for name in hidden:
            if name.endswith(_ZERO_POINT):
                self._require_zero(name)

    def __reduce__(self) -> tuple[type[Float8Checkpoint], tuple[Path, str]]:
        return (Float8Checkpoint, (self.folder, self.describe()))

    def entries(self) -> Mapping[str, TensorEntry]:
        """Return every weight, F8 ones as bfloat16, without scales."""
        return self._shown

    def stored_entries(self) -> Mapping[str, TensorEntry]:
        """Return every tensor as the files hold it, scales included."""
        return super().entries()

    def config_json(self) -> dict[str, Any]:
        """Return `config.json` without what it says about quantisation."""
        return {key: value for key, value in super().config_json().items() if key != "quantization_config"}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start:stop`: dequantised in float32 where they are stored in F8, else as they are stored."""
        values = super().read(name, start, stop)
        if self.stored_entries()[name].dtype not in FLOAT8_DTYPES:
            return values
        scaling = self.scalings.get(name)
        if scaling is None:
            return values.float()
        return values.float() * scales_of_range(scaling, self._scale(scaling), start, stop)

    def read_stored(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements `start:stop` as the files hold them."""
        return super().read(name, start, stop)

    def _scale(self, scaling: Scaling) -> Tensor:
        name = scaling.scale.name
        known = self._scales.get(name)
        if known is None:
            known = self._scales[name] = self._read_scale(scaling)
            while len(self._scales) > _REMEMBERED_SCALES:
                self._scales.pop(next(iter(self._scales)))
        return known

    def _read_scale(self, scaling: Scaling) -> Tensor:
        entry = scaling.scale
        if entry.dtype in ("F8_E8M0", "U8"):
            raw = self.read_bytes(entry.name, 0, entry.elements)
            values = torch.where(raw == _E8M0_NAN, torch.nan, (raw.float() - _E8M0_BIAS).exp2())
        else:
            values = super().read(entry.name, 0, entry.elements).float()
        good = torch.isfinite(values) & (values >= 0.0)
        if not good.all():
            first = int((~good).nonzero()[0, 0])
            raise NumericalError(
                f"'{self.describe()}' has a scale that is not a number of 0 or more: '{entry.name}', element {first}.",
                expected="finite scales",
                found=str(float(values[first])),
                fix="download or copy the checkpoint again, or use the unquantised model",
            )
        return values.view(scaling.grid)

    def _require_zero(self, name: str) -> None:
        entry = self.stored_entries()[name]
        raw = self.read_bytes(name, 0, entry.elements)
        # -0.0 of any floating-point format is its highest bit; a number that is not zero has others.
        if (raw & (0x7F if entry.dtype.startswith(("F", "B")) else 0xFF)).any():
            raise DataError(
                f"'{self.describe()}' is quantised around points other than zero.",
                expected="8-bit floating-point weights with scales alone",
                found=f"'{name}' with values other than 0",
                fix="use the unquantised model that it was made from",
            )


def open_checkpoint(folder: Path, text: str | None = None) -> Checkpoint:
    """Return the tensors of a model folder: a `Float8Checkpoint` where weights are stored in F8.

    Raises:
        KeelwrightError: It is not a usable model; see `Checkpoint`.
    """
    opened = Checkpoint(folder, text)
    has_float8 = any(entry.dtype in FLOAT8_DTYPES for entry in opened.entries().values())
    if not has_float8 and float8_settings(opened.config_json()) is None:
        return opened
    opened.close()
    return Float8Checkpoint(folder, text)


def find_scalings(
    entries: Mapping[str, TensorEntry], settings: Mapping[str, Any] | None, text: str
) -> dict[str, Scaling]:
    """Return the scaling of every F8 weight, by name.

    Args:
        entries: The tensors as they are stored.
        settings: The checkpoint's `quantization_config`; None where it has none.
        text: The user's own words for the checkpoint.

    Raises:
        DataError: The settings announce scales and one is missing, or one does not fit its weight.
    """
    blocks = _block_size(settings)
    found = {}
    for name, entry in entries.items():
        if settings is not None and entry.dtype in ("I8", "U8") and f"{name}_scale_inv" in entries:
            raise DataError(
                f"'{text}' stores '{name}' packed, several weights to a byte.",
                expected=f"8-bit floating-point weights: {', '.join(sorted(FLOAT8_DTYPES))}",
                found=f"{entry.dtype} with scales",
                fix="use the unquantised model that it was made from",
            )
        if entry.dtype not in FLOAT8_DTYPES or name.endswith(_ZERO_POINT):
            continue
        scale = next((entries[one] for one in scale_names(name) if one in entries), None)
        if scale is not None:
            found[name] = fit_scale(entry, scale, blocks, text)
        elif settings is not None:
            raise DataError(
                f"'{text}' stores '{name}' in {entry.dtype} without a scale.",
                expected=f"one of {', '.join(scale_names(name))}",
                found=f"none of them, and a quantization_config with method '{settings.get('quant_method')}'",
                fix="download the checkpoint again, or use the unquantised model that it was made from",
            )
    return found


def scale_names(weight: str) -> tuple[str, ...]:
    """Return the names under which a weight's scales may be stored, most usual first.

    >>> scale_names("a.weight")[:2]
    ('a.weight_scale_inv', 'a.weight_scale')
    """
    both = (f"{weight}_scale_inv", f"{weight}_scale")
    stem = weight.removesuffix(".weight")
    return both if stem == weight else (*both, f"{stem}.scale", f"{stem}.qscale_weight")


def fit_scale(weight: TensorEntry, scale: TensorEntry, blocks: tuple[int, int] | None, text: str) -> Scaling:
    """Return which part of a weight each of its scales covers.

    Args:
        weight: The F8 weight.
        scale: Its scales.
        blocks: Rows and columns of a block as the settings say; None where they say nothing.
        text: The user's own words for the checkpoint.

    Raises:
        DataError: They do not fit.
    """
    shape, axes = scale.shape, len(weight.shape)
    if scale.elements == 1:
        shape = (1,) * axes
    elif len(shape) == 1 and axes > 1 and shape[0] == weight.shape[0]:
        shape = (*shape, *(1,) * (axes - 1))
    sizes = (None,) * max(0, axes - 2) + (blocks or (None, None)) if axes >= 2 else (None,) * axes
    block = []
    if scale.dtype in _SCALE_DTYPES and len(shape) == axes:
        for length, count, size in zip(weight.shape, shape, sizes, strict=True):
            if count == 1:
                block.append(max(1, length))
            elif size is not None and -(-length // size) == count:
                block.append(size)
            elif count and length % count == 0 and length:
                block.append(length // count)
    if len(block) != axes or len(shape) != axes:
        raise DataError(
            f"'{text}': the scales '{scale.name}' do not fit the weight '{weight.name}'.",
            expected=f"one scale, one per row, or one per block of {list(weight.shape)}"
            + (f" in blocks of {list(blocks)}" if blocks else ""),
            found=f"{scale.dtype} {list(scale.shape)}",
            fix="download the checkpoint again, or use the unquantised model that it was made from",
        )
    return Scaling(weight, scale, tuple(shape), tuple(block))


def scales_of_range(scaling: Scaling, scales: Tensor, start: int, stop: int) -> Tensor:
    """Return the scale of each of the elements `start:stop` of the flattened weight, in float32.

    Args:
        scaling: Which part of the weight each scale covers.
        scales: The scales, shape `scaling.grid`.
        start, stop: A range of elements.
    """
    if not scaling.weight.shape or scales.numel() == 1:
        return scales.reshape(1).expand(stop - start)
    columns = max(1, scaling.weight.shape[-1])
    first, last = start // columns, -(-stop // columns)
    chosen = scales.reshape(-1, scaling.grid[-1])[lines_of_rows(scaling, first, last)]
    wide = chosen.repeat_interleave(scaling.block[-1], dim=1)[:, :columns]
    return wide.reshape(-1)[start - first * columns : stop - first * columns]


def lines_of_rows(scaling: Scaling, first: int, last: int) -> Tensor:
    """Return for each of the rows `first:last` (along the last axis) its row in the grid of scales."""
    rest = torch.arange(first, last)
    line = torch.zeros_like(rest)
    stride = 1
    axes = list(zip(scaling.weight.shape[:-1], scaling.grid[:-1], scaling.block[:-1], strict=True))
    for size, count, block in reversed(axes):
        line += (rest % size) // block * stride
        rest = rest // size
        stride *= count
    return line


def whole_state(source: TensorSource, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return every tensor of a source in memory, weights rounded once to `dtype`: what a module is filled with."""
    return {
        name: (values.to(dtype) if values.is_floating_point() else values).view(entry.shape)
        for name, entry in source.entries().items()
        for values in (source.read(name, 0, entry.elements),)
    }


def _block_size(settings: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """Return rows and columns of a block, as any of the known settings spell them."""
    if settings is None:
        return None
    groups = settings.get("config_groups")
    parts = [one.get("weights") for one in groups.values()] if isinstance(groups, Mapping) else []
    found = [settings.get("weight_block_size"), *(one.get("block_structure") for one in parts if one)]
    for size in found:
        if isinstance(size, list | tuple) and len(size) == 2 and all(type(one) is int and one > 0 for one in size):
            return (size[0], size[1])
    return None


def _hidden(entries: Mapping[str, TensorEntry], scalings: Mapping[str, Scaling]) -> set[str]:
    """Return the stored tensors that are no weights: scales, and settings of activations beside scaled weights."""
    hidden = {one.scale.name for one in scalings.values()}
    stems = {name.rpartition(".")[0] for name in scalings}
    # A cache's scales stand in the attention module, above the projections.
    parents = {stem.rpartition(".")[0] for stem in stems}
    for name, entry in entries.items():
        stem, _, last = name.rpartition(".")
        beside = last in _ACTIVATION_ENDS and (stem in stems or stem in parents)
        # An expert's scale is called after its parameter: gate_up_proj_input_scale.
        named = any(last.endswith(f"_{one}") for one in _ACTIVATION_ENDS) and stem in stems
        zero = name.endswith(_ZERO_POINT) and name.removesuffix(_ZERO_POINT) in scalings
        if zero or ((beside or named) and entry.dtype in FLOAT_DTYPES):
            hidden.add(name)
    return hidden


def largest(dtype: str) -> float:
    """Return the largest finite number of an F8 dtype: 448 for F8_E4M3, 57344 for F8_E5M2."""
    return float(torch.finfo(TORCH_DTYPES[dtype]).max)
