# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter from two full checkpoints: the difference of each matrix at a lower rank.

What it is: `tuned - base`, matrix by matrix, replaced by its best approximation of a rank or of a share of energy
(`ops.lowrank`), and written as a PEFT adapter on the base. What changed and is no matrix of a linear layer goes with it
whole, where PEFT can load it: biases through `bias: all`, norms and embeddings as `modules_to_save` (tied
embeddings in both places). Anything else that changed is named, and is an error
unless the caller accepts it.

Cost: one matrix at a time, `4 m n` bytes for the difference and three float64 squares of its smaller side where the
rank is found exactly; the adapter itself stays in memory until it is written.

Limits: the error is that of the weights in float32, before a loader rounds them; how much of a behaviour a rank keeps
is not told by it. Tensors with three and more axes (stacked experts, convolutions) are not represented.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from keelwright.core.digests import json_digest
from keelwright.core.errors import ConfigError, ModelMismatchError
from keelwright.core.files import require_new_folder
from keelwright.core.protocols import Progress, Silent, TensorEntry, TensorSource
from keelwright.core.seeds import generator
from keelwright.models.adapter_changes import Layout
from keelwright.models.adapters import AdaptedCheckpoint, LoraFactors
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.headers import FLOAT_DTYPES
from keelwright.models.memory import require_memory, shown_bytes
from keelwright.models.names import name_map
from keelwright.models.skeleton import skeleton
from keelwright.ops.lowrank import LowRank, lowrank, require_target
from keelwright.weights.adapter import AdapterFiles, lora_config, lora_tensors, require_room, write_adapter_folder
from keelwright.weights.card import Provenance
from keelwright.weights.numerics import require_finite
from keelwright.weights.sources import AliasedSource, source_digest

_CHUNK = 1 << 20
# What PEFT takes for an adapter that has no target of its own.
_NO_TARGETS = "dummy-target-modules"


@dataclass(slots=True)
class _Split:
    """Where each changed tensor goes."""

    matrices: dict[str, str] = field(default_factory=dict)
    """Tensor to module, of linear layers."""
    transposed: set[str] = field(default_factory=set)
    """Of these, the ones that are stored `[inputs, outputs]`."""
    biases: dict[str, str] = field(default_factory=dict)
    """Tensor to module."""
    whole: dict[str, str] = field(default_factory=dict)
    """Tensor to module, of modules that are saved as they are: each with all of its tensors."""
    lost: list[str] = field(default_factory=list)
    """Changed, and in no form that PEFT loads."""
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Tensors of `whole` that other modules hold too, with these modules."""


def extract_lora(
    base: TensorSource,
    tuned: TensorSource,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    allow_partial: bool = False,
    seed: int = 0,
    base_name: str | None = None,
    tokenizer_from: Path | None = None,
    provenance: Provenance | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the difference of two checkpoints as a LoRA adapter on the first, and say how much of it was kept.

    Args:
        base: The checkpoint that the adapter is for.
        tuned: The one that base and adapter together approximate: a checkpoint, or one with adapters of any kind.
        out: The folder; must not exist, or be empty.
        rank: Most columns of each factor.
        energy: Share of each difference's squared norm to keep, in (0, 1]; one of the two is needed.
        allow_partial: Go on although something changed that no adapter can hold.
        seed: Of the random sketches that find the ranks of large matrices.
        base_name: What the adapter's settings call the base; by default the user's own words for it.
        tokenizer_from: The folder whose tokenizer goes with the adapter.
        provenance: For the lock file and the card.
        progress: Told about every tensor.

    Returns:
        `{"schema", "command", "out", "form", "rank", "energy", "tensors": [{"name", "shape", "rank", "energy",
        "relative_error", "norm"}], "saved_whole", "not_represented", "totals": {"matrices", "parameters",
        "largest_rank", "energy", "relative_error"}, "files", "bytes", "seconds"}`.

    Raises:
        ConfigError: Not exactly one of `rank` and `energy`, or something changed that an adapter cannot hold.
        ModelMismatchError: The two do not have the same tensors, or do not differ at all.
        NumericalError: A weight is NaN or infinite.
        StorageError: The folder is in use, or the disk is full or read-only.
        ResourceError: A matrix does not fit in memory.
    """
    started = time.monotonic()
    progress = progress or Silent()
    require_target(rank, energy)
    require_new_folder(out, flag="--out")
    model = _require_model(base)
    entries = _require_same(base, tuned)
    names = name_map(model, base)
    require_memory(_memory_bytes(entries, names, rank), f"Extracting from '{tuned.describe()}'")
    split = _split(model, names, _changed(base, tuned, entries, progress))
    _require_represented(split, base, tuned, allow_partial=allow_partial)
    size = None if rank is None else _output_bytes(split, entries, rank)
    progress.plan("extract", _plan_rows(split, size))
    if size is not None:
        require_room(out, size)
    factors, rows = _factors(base, tuned, split, entries, (rank, energy, seed), progress)
    whole = _saved_whole(tuned, split, factors)
    digests = {"base": source_digest(base), "tuned": source_digest(tuned)}
    config = _config(factors, split, base_name or base.describe())
    totals = _totals(factors, rows)
    notes = _notes(split, totals)
    described = {
        role: {"model": source.describe(), "digest": digests[role]}
        for role, source in (("base", base), ("tuned", tuned))
    }
    files = AdapterFiles(
        {**lora_tensors(factors), **whole},
        config,
        described,
        provenance or Provenance(method="extract_lora", title="Difference of two checkpoints as LoRA", seed=seed),
        json_digest(["extract_lora", digests, rank, energy, allow_partial, seed]),
        tokenizer_from,
        notes,
        {"extraction": {"tensors": rows, "totals": totals, "not_represented": split.lost}},
    )
    manifest = write_adapter_folder(files, out, started=started)
    for note in notes:
        progress.note(note)
    return {
        "schema": 1,
        "command": "weights extract-lora",
        "out": str(out),
        "form": "adapter",
        "rank": rank,
        "energy": energy,
        "tensors": rows,
        "saved_whole": sorted({*split.biases, *split.whole}),
        "not_represented": split.lost,
        "totals": totals,
        "files": dict(manifest.files),
        "bytes": manifest.bytes,
        "seconds": round(manifest.seconds, 3),
    }


def _require_model(base: TensorSource) -> PreTrainedModel:
    inner = base.inner if isinstance(base, AliasedSource) else base
    inner = inner.base if isinstance(inner, AdaptedCheckpoint) else inner
    model = skeleton(inner.config_json(), base.describe()) if isinstance(inner, Checkpoint) else None
    if model is None:
        raise ConfigError(
            f"The layers of '{base.describe()}' are not known, so no adapter can be made for it.",
            expected="a checkpoint of a language model that transformers knows",
            found="no config.json of one",
            fix="save the model as a folder with its config.json; a newer transformers may know the architecture",
        )
    return model


def _require_same(base: TensorSource, tuned: TensorSource) -> Mapping[str, TensorEntry]:
    own, others = base.entries(), tuned.entries()
    lonely = sorted(own.keys() ^ others.keys())
    if lonely:
        side = base if lonely[0] in own else tuned
        raise ModelMismatchError(
            "'base' and 'tuned' do not have the same tensors.",
            expected=f"{len(own)} tensors as in 'base' ({base.describe()})",
            found=f"{len(others)} in 'tuned' ({tuned.describe()}); only in {side.describe()}: {', '.join(lonely[:3])}",
            fix="pass the model that was tuned; where only one of them ties its head, save both in the same way",
        )
    for name, entry in own.items():
        other = others[name]
        if entry.shape != other.shape or (entry.dtype in FLOAT_DTYPES) != (other.dtype in FLOAT_DTYPES):
            raise ModelMismatchError(
                f"'base' and 'tuned' differ in the layout of '{name}'.",
                expected=f"{entry.dtype} {list(entry.shape)} as in '{base.describe()}'",
                found=f"{other.dtype} {list(other.shape)} in '{tuned.describe()}'",
                fix="pass two models of the same size and vocabulary, one tuned from the other",
            )
    return own


def _changed(
    base: TensorSource, tuned: TensorSource, entries: Mapping[str, TensorEntry], progress: Progress
) -> list[str]:
    """Return the tensors that do not hold the same values; of most only the first chunk is read."""
    progress.stage("compare", total=len(entries), unit="tensors")
    found = []
    for name, entry in entries.items():
        for start in range(0, entry.elements, _CHUNK):
            stop = min(entry.elements, start + _CHUNK)
            one, two = base.read(name, start, stop), tuned.read(name, start, stop)
            same = torch.equal(one, two) if one.dtype is two.dtype else torch.equal(one.double(), two.double())
            if not same:
                found.append(name)
                break
        progress.advance()
    if not found:
        raise ModelMismatchError(
            "'base' and 'tuned' hold the same weights.",
            expected=f"a difference between '{base.describe()}' and '{tuned.describe()}'",
            found="none in any tensor",
            fix="check that the second model is the tuned one",
        )
    return found


def _split(model: PreTrainedModel, names: Mapping[str, str], changed: list[str]) -> _Split:
    parameters = {tensor: parameter for parameter, tensor in names.items()}
    split = _Split()
    # Biases last: whether one travels with its module depends on the module's weight.
    for tensor in sorted(changed, key=lambda one: one.endswith("bias")):
        if tensor not in parameters:
            split.lost.append(tensor)
            continue
        path, _, leaf = parameters[tensor].rpartition(".")
        module = model.get_submodule(path)
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, (nn.Linear, Conv1D)) and leaf == "weight":
            split.matrices[tensor] = path
            if isinstance(module, Conv1D):
                split.transposed.add(tensor)
        elif leaf == "bias" and path not in split.whole.values():
            split.biases[tensor] = path
        elif path and not list(module.children()) and all(one.ndim <= 2 for one in own.values()):
            for name, parameter in own.items():
                if (stored := names.get(f"{path}.{name}")) is not None:
                    split.whole[stored] = path
                    split.tied.update(_ties(model, stored, path, parameter))
        else:
            split.lost.append(tensor)
    return split


def _ties(model: PreTrainedModel, tensor: str, path: str, parameter: Tensor) -> dict[str, tuple[str, ...]]:
    """Return the other modules that hold a parameter, under its tensor's name; nothing where there are none."""
    places = [name for name, one in model.named_parameters(remove_duplicate=False) if one is parameter]
    others = tuple(place.rpartition(".")[0] for place in places if place.rpartition(".")[0] != path)
    return {tensor: others} if others else {}


def _require_represented(split: _Split, base: TensorSource, tuned: TensorSource, *, allow_partial: bool) -> None:
    if split.lost and not allow_partial:
        shown = ", ".join(split.lost[:3]) + (f" and {len(split.lost) - 3} more" if len(split.lost) > 3 else "")
        raise ConfigError(
            f"An adapter on '{base.describe()}' cannot hold all that changed in '{tuned.describe()}'.",
            expected="changes of linear layers, embeddings, norms and biases",
            found=f"also {shown}",
            fix="--allow-partial leaves these as they are in the base; or keep the full model",
        )


def _memory_bytes(entries: Mapping[str, TensorEntry], names: Mapping[str, str], rank: int | None) -> int:
    """Return what the largest matrix may need: the difference, both reads of a chunk, and the squares of the search."""

    def needed(shape: tuple[int, ...]) -> int:
        small, large = sorted(shape)
        return 4 * small * large + 3 * 8 * small * small + 2 * 8 * large * min(small, rank or small)

    return max((needed(entries[name].shape) for name in names.values() if len(entries[name].shape) == 2), default=0)


def _output_bytes(split: _Split, entries: Mapping[str, TensorEntry], rank: int) -> int:
    matrices = sum(4 * min(rank, *entries[name].shape) * sum(entries[name].shape) for name in split.matrices)
    return matrices + sum(4 * entries[name].elements for name in (*split.biases, *split.whole, *split.tied))


def _plan_rows(split: _Split, size: int | None) -> list[tuple[str, str]]:
    rows = [
        ("matrices", f"{len(split.matrices)} changed"),
        ("saved whole", f"{len(split.whole)} tensors and {len(split.biases)} biases"),
        ("output", "as the energy asks" if size is None else f"at most {shown_bytes(size)}"),
    ]
    return rows + ([("not represented", ", ".join(split.lost))] if split.lost else [])


def _factors(
    base: TensorSource,
    tuned: TensorSource,
    split: _Split,
    entries: Mapping[str, TensorEntry],
    target: tuple[int | None, float | None, int],
    progress: Progress,
) -> tuple[dict[str, LoraFactors], list[dict[str, Any]]]:
    """Return the factors of every changed matrix by PEFT's name of the weight, and a row of the report for each."""
    rank, energy, seed = target
    progress.stage("extract", total=len(split.matrices), unit="matrices")
    factors: dict[str, LoraFactors] = {}
    rows: list[dict[str, Any]] = []
    for name in split.matrices:
        difference = _difference(base, tuned, entries[name])
        # Each matrix draws its own numbers: the order of the tensors must not change the output.
        one: LowRank = lowrank(difference, rank=rank, energy=energy, random=generator(seed, "extract_lora", name))
        if one.rank:
            layout: Layout = "transposed" if name in split.transposed else "linear"
            # PEFT knows the module's name, which differs from the tensor's where a checkpoint leaves a prefix away.
            factors[f"{split.matrices[name]}.weight"] = LoraFactors(one.left, one.right, 1.0, layout)
        rows.append(
            {
                "name": name,
                "shape": list(entries[name].shape),
                "rank": one.rank,
                "energy": one.energy,
                "relative_error": one.relative_error,
                "norm": one.norm,
            }
        )
        progress.advance()
    return factors, rows


def _difference(base: TensorSource, tuned: TensorSource, entry: TensorEntry) -> Tensor:
    wide = torch.float64 if entry.dtype == "F64" else torch.float32
    found = torch.empty(entry.elements, dtype=wide)
    for start in range(0, entry.elements, _CHUNK):
        stop = min(entry.elements, start + _CHUNK)
        parts = []
        for role, source in (("tuned", tuned), ("base", base)):
            values = source.read(entry.name, start, stop).to(wide)
            require_finite(values, role=role, name=entry.name, offset=start, source=source.describe())
            parts.append(values)
        torch.sub(parts[0], parts[1], out=found[start:stop])
    return found.view(entry.shape)


def _saved_whole(tuned: TensorSource, split: _Split, factors: Mapping[str, LoraFactors]) -> dict[str, Tensor]:
    """Return the tensors that go with the adapter as they are, by PEFT's keys."""
    wrapped = {name.removesuffix(".weight") for name in factors}
    found: dict[str, Tensor] = {}
    for name, module in (*split.whole.items(), *split.biases.items()):
        entry = tuned.entries()[name]
        values = tuned.read(name, 0, entry.elements).view(entry.shape)
        leaf = name.rpartition(".")[2]
        inside = ".base_layer" if module in wrapped else ""
        found[f"base_model.model.{module}{inside}.{leaf}"] = values
        # A file cannot hold one tensor under two names.
        found.update({f"base_model.model.{other}.{leaf}": values.clone() for other in split.tied.get(name, ())})
    return found


def _config(factors: Mapping[str, LoraFactors], split: _Split, base_name: str) -> dict[str, Any]:
    config = lora_config(factors, like={"base_model_name_or_path": base_name, "task_type": "CAUSAL_LM"})
    config["target_modules"] = config["target_modules"] or _NO_TARGETS
    if split.biases:
        config["bias"] = "all"
    if split.whole:
        # PEFT can tie the copies of an embedding that has one of the usual names. Others get a copy in each place.
        usual = all(split.whole[name].rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in split.tied)
        copies = () if usual else (module for others in split.tied.values() for module in others)
        config["modules_to_save"] = sorted({*split.whole.values(), *copies})
        config["ensure_weight_tying"] = usual and bool(split.tied)
    return config


def _totals(factors: Mapping[str, LoraFactors], rows: list[dict[str, Any]]) -> dict[str, Any]:
    total = math.fsum(row["norm"] ** 2 for row in rows)
    lost = math.fsum((row["relative_error"] * row["norm"]) ** 2 for row in rows)
    return {
        "matrices": len(factors),
        "parameters": sum(one.left.numel() + one.right.numel() for one in factors.values()),
        "largest_rank": max((one.rank for one in factors.values()), default=0),
        "energy": 1.0 - lost / total if total else 1.0,
        "relative_error": math.sqrt(lost / total) if total else 0.0,
    }


def _notes(split: _Split, totals: Mapping[str, Any]) -> list[str]:
    notes = [
        f"{totals['matrices']} matrices at rank {totals['largest_rank']} or less keep {totals['energy']:.4%} of the "
        f"squared difference; relative error {totals['relative_error']:.3g}"
    ]
    saved = sorted({*split.whole, *split.biases})
    if saved:
        notes.append(f"saved whole: {len(saved)} tensors, such as {saved[0]}")
    if split.lost:
        notes.append(f"changed but not represented: {', '.join(split.lost)}")
    return notes
