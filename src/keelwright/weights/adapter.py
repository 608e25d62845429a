# SPDX-License-Identifier: Apache-2.0
"""Adapters as output: a linear combination of models on one base is again an adapter on that base.

With weights that sum to one, `sum_i w_i (base + D_i) = base + sum_i w_i D_i`. One LoRA adapter alone keeps its rank and
its settings, and only its `B` is scaled. Several are stacked: `B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]`,
`A = [A_1; A_2; ...]`, a scale of 1, and the sum of the ranks; on request they are then truncated to a rank or a share
of energy, which is no longer exact and says by how much. Adding factor matrices would not add the adapters, and no mode
does it. Changes that are no low-rank sum (DoRA, LoHa, IA3, ...) make a full output.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load, save
from torch import Tensor

from keelwright.core.digests import json_digest
from keelwright.core.errors import ConfigError, NumericalError, StorageError
from keelwright.core.files import write_atomic
from keelwright.core.protocols import TensorSource, WeightEdit
from keelwright.models.adapter_changes import Layout
from keelwright.models.adapters import AdaptedCheckpoint, LoraAdapter, LoraFactors, split_key
from keelwright.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from keelwright.models.headers import read_header
from keelwright.models.memory import shown_bytes
from keelwright.ops.lowrank import recompress, require_target
from keelwright.weights.card import Provenance, model_card
from keelwright.weights.companions import copy_tokenizer
from keelwright.weights.journal import begin, sole_writer
from keelwright.weights.lock import LOCK_FILE, lock_text
from keelwright.weights.sources import source_digest
from keelwright.weights.write import Manifest, finish, write_text

_SUM_TOLERANCE = 1e-12
"""Weights such as 1 - 0.3 and 0.3 sum to one within this."""

_COMMON = ("base_model_name_or_path", "task_type", "revision")
_PLAIN = {"init_lora_weights": True, "target_parameters": None, "use_bdlora": None, "velora_config": None}
_SPARE_BYTES = 16 << 20
"""For the card, the lock file and the tokenizer."""


@runtime_checkable
class Combination(Protocol):
    """An edit that is a weighted sum of its roles."""

    def combination(self) -> Mapping[str, float]:
        """Return the weight of each role."""


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter of the sum."""

    adapter: LoraAdapter
    weight: float


def adapter_terms(edit: WeightEdit, sources: Mapping[str, TensorSource]) -> list[Term] | None:
    """Return the edit as a weighted sum of adapters on one base, or None when it is no such sum.

    It is one when the edit is a combination whose weights sum to one, every role is the base itself or the base with
    adapters that are low-rank sums, and at least one has adapters. Several adapters, and single ones of another kind
    than LoRA, can only be written when none replaces whole tensors or adapts an embedding.
    """
    if not isinstance(edit, Combination):
        return None
    weights = edit.combination()
    if not math.isclose(sum(weights.values()), 1.0, rel_tol=0.0, abs_tol=_SUM_TOLERANCE):
        return None
    layout = edit.roles()[-1]
    # The tuned model's own adapter stays even with weight 0: its settings lay out the output.
    terms = [
        Term(adapter, weight)
        for role, weight in weights.items()
        for adapter in _adapters(sources[role])
        if weight != 0.0 or role == layout
    ]
    if not terms or len({source_digest(_base(sources[role])) for role in weights}) != 1:
        return None
    if any(term.adapter.changes or term.adapter.late for term in terms):
        return None
    alone = len(terms) == 1 and terms[0].adapter.kind == "LORA"
    return terms if alone or all(_can_stack(term.adapter) for term in terms) else None


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What an adapter folder is to hold."""

    tensors: Mapping[str, Tensor]
    """By PEFT's keys."""
    config: Mapping[str, Any]
    """`adapter_config.json`."""
    sources: Mapping[str, Mapping[str, str]]
    """`{"model", "digest"}` by role."""
    provenance: Provenance
    digest: str
    """Of everything that the folder is made from."""
    tokenizer: Path | None = None
    """The folder whose tokenizer is copied."""
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """More for the lock file."""


def write_adapter(
    edit: WeightEdit,
    sources: Mapping[str, TensorSource],
    terms: list[Term],
    out: Path,
    *,
    like: Path,
    provenance: Provenance,
    rank: int | None = None,
    energy: float | None = None,
) -> Manifest:
    """Write the edit as a PEFT adapter folder: whole or not at all.

    Args:
        edit: The edit.
        sources: Tensors by role.
        terms: What `adapter_terms` returned.
        out: The folder; must not exist, or be empty.
        like: Folder of the tuned model's adapter: its settings and tokenizer are kept.
        provenance: For the lock file and the card.
        rank: Truncate every sum to this rank; by default, and without `energy`, the output is exact.
        energy: Truncate every sum to the smallest rank that keeps this share of its squared norm.

    Raises:
        StorageError: The folder is in use, or the disk is full or read-only.
        NumericalError: A factor is not finite.
        ConfigError: `rank` and `energy` are both given, or the adapter to truncate is one of an embedding.
    """
    started = time.monotonic()
    config = read_json(like / ADAPTER_CONFIG, str(like))
    truncated = rank is not None or energy is not None
    if truncated:
        require_target(rank, energy)
    notes: list[str] = []
    base = _base(next(iter(sources.values())))
    if len(terms) == 1 and terms[0].adapter.kind == "LORA" and not truncated:
        tensors = _scaled(like, terms[0].weight, base)
    else:
        _require_stackable(terms)
        factors = _stacked(terms, config)
        if truncated:
            factors, notes = _truncated(factors, rank=rank, energy=energy)
        tensors = lora_tensors(factors)
        config = lora_config(factors, like=config)
    digests = {role: source_digest(source) for role, source in sources.items()}
    described = {role: {"model": source.describe(), "digest": digests[role]} for role, source in sources.items()}
    digest = json_digest([repr(edit), digests, *([{"rank": rank, "energy": energy}] if truncated else [])])
    files = AdapterFiles(tensors, config, described, provenance, digest, like, notes)
    return write_adapter_folder(files, out, started=started)


def write_adapter_folder(files: AdapterFiles, out: Path, *, started: float) -> Manifest:
    """Write an adapter folder with its lock file and card: whole or not at all.

    Args:
        files: What it holds.
        out: The folder; must not exist, or be empty.
        started: When the work began, by `time.monotonic`.

    Raises:
        StorageError: The folder is in use, or the disk is full or read-only.
        NumericalError: A tensor is not finite.
    """
    for name, tensor in files.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericalError(
                f"The adapter's tensor '{name}' is not finite.",
                expected="finite factors",
                found="NaN or infinity",
                fix="use an adapter from before its training run diverged",
            )
    require_room(out, sum(one.numel() * one.element_size() for one in files.tensors.values()))
    partial = begin(out, digest=files.digest, summary={"method": files.provenance.method})
    with sole_writer(partial):
        return _write_into(partial, files, out, started)


def _write_into(partial: Path, files: AdapterFiles, out: Path, started: float) -> Manifest:
    # One entry: the library writes several in an order of its own, and equal inputs must give equal bytes.
    raw = save(dict(files.tensors), metadata={"format": "pt"})
    write_atomic(partial / ADAPTER_WEIGHTS, raw)
    written = {ADAPTER_WEIGHTS: hashlib.sha256(raw).hexdigest()}
    if files.tokenizer is not None:
        written.update(copy_tokenizer(files.tokenizer, partial))
    text = json.dumps(dict(files.config), indent=2, sort_keys=True) + "\n"
    written[ADAPTER_CONFIG] = write_text(partial / ADAPTER_CONFIG, text)
    card = model_card(files.provenance, files.sources, tuple(files.notes), library="peft")
    written["README.md"] = write_text(partial / "README.md", card)
    manifest = Manifest(
        out, written, len(files.tensors), len(raw), time.monotonic() - started, notes=tuple(files.notes)
    )
    facts = {
        "tensors": manifest.tensors,
        "bytes": manifest.bytes,
        "seconds": manifest.seconds,
        "notes": list(files.notes),
        **files.facts,
    }
    lock = lock_text(files.provenance, files.sources, plan_digest=files.digest, files=written, facts=facts)
    write_atomic(partial / LOCK_FILE, lock)
    finish(partial, out)
    return manifest


def require_room(out: Path, needed: int) -> None:
    """Raise `StorageError` when the disk of `out` lacks room for so many bytes and a little more.

    Args:
        out: The output folder, which need not exist.
        needed: Bytes of the weights.
    """
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed + _SPARE_BYTES > free:
        raise StorageError(
            f"The disk that holds '{out}' has too little room.",
            expected=f"{shown_bytes(needed + _SPARE_BYTES)} free",
            found=f"{shown_bytes(free)} free",
            fix="free some space, or write to another disk",
        )


def lora_tensors(factors: Mapping[str, LoraFactors]) -> dict[str, Tensor]:
    """Return sums of scale 1 by PEFT's keys, in float32.

    Args:
        factors: By tensor name, each of a linear or transposed layer.
    """
    tensors: dict[str, Tensor] = {}
    for name, one in factors.items():
        left, right = (one.right.T, one.left.T) if one.layout == "transposed" else (one.left, one.right)
        module = name.removesuffix(".weight")
        tensors[f"base_model.model.{module}.lora_A.weight"] = right.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = left.contiguous()
    return tensors


def lora_config(factors: Mapping[str, LoraFactors], *, like: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of plain LoRA with these factors, a scale of 1 everywhere.

    Args:
        factors: By tensor name.
        like: Settings to keep where they do not matter; those of another kind than LoRA give only base and task.
    """
    ranks = {name.removesuffix(".weight"): one.rank for name, one in factors.items()}
    rank = max(ranks.values(), default=1)
    other = {module: own for module, own in ranks.items() if own != rank}
    kept = like if like.get("peft_type") == "LORA" else {key: like[key] for key in _COMMON if key in like}
    # What made the inputs a variant of LoRA is in the factors now.
    plain = {key: value for key, value in _PLAIN.items() if key in kept}
    return {
        "inference_mode": True,
        "bias": "none",
        **kept,
        **plain,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": other,
        "use_rslora": False,
        "fan_in_fan_out": any(one.layout == "transposed" for one in factors.values()),
        "target_modules": sorted(ranks),
        # Every module is named in full: what else chooses modules would only get in the way.
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "lora_dropout": 0.0,
        "modules_to_save": None,
    }


def _can_stack(adapter: LoraAdapter) -> bool:
    # Factors of a bare parameter, which is no layer's `weight`, have no place in plain LoRA.
    return not adapter.full_tensors and all(
        name.endswith(".weight") and not _is_embedding(name, one) for name, one in adapter.factors.items()
    )


def _is_embedding(name: str, factors: LoraFactors) -> bool:
    if factors.layout is None:
        return any(word in name for word in ("embed", "wte"))
    return factors.layout == "embedding"


def _require_stackable(terms: Sequence[Term]) -> None:
    for term in terms:
        if not _can_stack(term.adapter):
            raise ConfigError(
                f"The adapter '{term.adapter.text}' cannot be truncated.",
                expected="an adapter of linear layers that replaces no whole tensors",
                found=", ".join([*term.adapter.full_tensors, *term.adapter.factors][:3]),
                fix="write it exactly, without a rank or a share of energy",
            )


def _base(source: TensorSource) -> TensorSource:
    return source.base if isinstance(source, AdaptedCheckpoint) else source


def _adapters(source: TensorSource) -> tuple[LoraAdapter, ...]:
    return tuple(source.adapters) if isinstance(source, AdaptedCheckpoint) else ()


def _scaled(folder: Path, weight: float, base: TensorSource) -> dict[str, Tensor]:
    """Return the adapter's own tensors with `B` scaled, and whole tensors moved towards the base."""
    found: dict[str, Tensor] = {}
    for key, tensor in _load(folder / ADAPTER_WEIGHTS).items():
        module, part = split_key(key)
        if part is None:
            before = base.read(module, 0, base.entries()[module].elements).view(tensor.shape).float()
            after = tensor.float()
            mixed = (1.0 - weight) * before + weight * after
            # What training left alone stays to the bit, as in a full output.
            found[key] = torch.where(before == after, after, mixed).to(tensor.dtype)
        else:
            # In float32 whatever the adapter stores: a 16-bit product would be rounded a second time.
            found[key] = weight * tensor.float() if part.endswith("B") else tensor
    return found


def _stacked(terms: list[Term], config: Mapping[str, Any]) -> dict[str, LoraFactors]:
    """Return the stacked factors of all terms, scale 1 everywhere."""
    names = list(dict.fromkeys(name for term in terms for name in term.adapter.factors))
    fallback: Layout = "transposed" if config.get("fan_in_fan_out") else "linear"
    found: dict[str, LoraFactors] = {}
    for name in names:
        parts = [(term.weight, term.adapter.factors[name]) for term in terms if name in term.adapter.factors]
        left = torch.cat([weight * one.scale * one.left.float() for weight, one in parts], dim=1)
        right = torch.cat([one.right.float() for _, one in parts], dim=0)
        layout = next((one.layout for _, one in parts if one.layout is not None), fallback)
        if left.shape[1]:
            # AdaLoRA may have taken all of a layer's rank away.
            found[name] = LoraFactors(left, right, 1.0, layout)
    return found


def _truncated(
    factors: Mapping[str, LoraFactors], *, rank: int | None, energy: float | None
) -> tuple[dict[str, LoraFactors], list[str]]:
    """Return the sums at a lower rank, and what that costs in words."""
    found: dict[str, LoraFactors] = {}
    lost, total = 0.0, 0.0
    for name, one in factors.items():
        small = recompress(one.scale * one.left, one.right, rank=rank, energy=energy)
        lost += (small.relative_error * small.norm) ** 2
        total += small.norm**2
        if small.rank:
            found[name] = LoraFactors(small.left, small.right, 1.0, one.layout)
    error = math.sqrt(lost / total) if total else 0.0
    ranks = [one.rank for one in found.values()]
    stacked = max((one.rank for one in factors.values()), default=0)
    shown = f"rank {min(ranks, default=0)} to {max(ranks, default=0)}"
    return found, [f"truncated from rank {stacked} to {shown}; relative error of the whole change {error:.3g}"]


def _load(path: Path) -> dict[str, Tensor]:
    read_header(path)
    return dict(load(path.read_bytes()))
