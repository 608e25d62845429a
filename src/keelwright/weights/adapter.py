# SPDX-License-Identifier: Apache-2.0
"""Adapters as output: a linear combination of models on one base is again an adapter on that base.

With weights that sum to one, `sum_i w_i (base + D_i) = base + sum_i w_i D_i`. One adapter alone keeps its rank and its
settings, and only its `B` is scaled. Several are stacked: `B = [w_1 s_1 B_1, w_2 s_2 B_2, ...]`,
`A = [A_1; A_2; ...]`, a scale of 1, and the sum of the ranks. Adding factor matrices would not add the adapters.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load, save
from torch import Tensor

from keelwright.core.digests import json_digest
from keelwright.core.errors import NumericalError
from keelwright.core.files import write_atomic
from keelwright.core.protocols import TensorSource, WeightEdit
from keelwright.models.adapters import AdaptedCheckpoint, LoraAdapter, split_key
from keelwright.models.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from keelwright.models.headers import read_header
from keelwright.weights.card import Provenance, model_card
from keelwright.weights.companions import copy_tokenizer
from keelwright.weights.journal import begin
from keelwright.weights.lock import LOCK_FILE, lock_text
from keelwright.weights.sources import source_digest
from keelwright.weights.write import Manifest, finish, write_text

_SUM_TOLERANCE = 1e-12
"""Weights such as 1 - 0.3 and 0.3 sum to one within this."""


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
    adapters, and at least one has adapters. Several adapters can only be stacked when none replaces whole tensors or
    adapts an embedding.
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
    return terms if len(terms) == 1 or all(_can_stack(term.adapter) for term in terms) else None


def write_adapter(
    edit: WeightEdit,
    sources: Mapping[str, TensorSource],
    terms: list[Term],
    out: Path,
    *,
    like: Path,
    provenance: Provenance,
) -> Manifest:
    """Write the edit as a PEFT adapter folder: whole or not at all.

    Args:
        edit: The edit.
        sources: Tensors by role.
        terms: What `adapter_terms` returned.
        out: The folder; must not exist, or be empty.
        like: Folder of the tuned model's adapter: its settings and tokenizer are kept.
        provenance: For the lock file and the card.

    Raises:
        StorageError: The folder is in use, or the disk is full or read-only.
        NumericalError: A factor is not finite.
    """
    started = time.monotonic()
    config = read_json(like / ADAPTER_CONFIG, str(like))
    if len(terms) == 1:
        tensors = _scaled(like, terms[0].weight, _base(next(iter(sources.values()))))
    else:
        tensors, config = _stacked(terms, config)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericalError(
                f"The adapter's tensor '{name}' is not finite.",
                expected="finite factors",
                found="NaN or infinity",
                fix="use an adapter from before its training run diverged",
            )
    digests = {role: source_digest(source) for role, source in sources.items()}
    digest = json_digest([repr(edit), digests])
    partial = begin(out, digest=digest, summary={"method": provenance.method})
    raw = save(tensors, metadata={"format": "pt", "keelwright": digest})
    write_atomic(partial / ADAPTER_WEIGHTS, raw)
    files = {ADAPTER_WEIGHTS: hashlib.sha256(raw).hexdigest(), **copy_tokenizer(like, partial)}
    files[ADAPTER_CONFIG] = write_text(partial / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    described = {role: {"model": source.describe(), "digest": digests[role]} for role, source in sources.items()}
    files["README.md"] = write_text(partial / "README.md", model_card(provenance, described, library="peft"))
    manifest = Manifest(out, files, len(tensors), len(raw), time.monotonic() - started)
    facts = {"tensors": manifest.tensors, "bytes": manifest.bytes, "seconds": manifest.seconds, "notes": []}
    lock = lock_text(provenance, described, plan_digest=digest, files=files, facts=facts)
    write_atomic(partial / LOCK_FILE, lock)
    finish(partial, out)
    return manifest


def _can_stack(adapter: LoraAdapter) -> bool:
    embeds = any(word in name for name in adapter.factors for word in ("embed", "wte"))
    return not adapter.full_tensors and not embeds


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


def _stacked(terms: list[Term], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the stacked factors of all terms and the settings that go with them, scale 1 everywhere."""
    names = list(dict.fromkeys(name for term in terms for name in term.adapter.factors))
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in names:
        parts = [(term.weight, term.adapter.factors[name]) for term in terms if name in term.adapter.factors]
        left = torch.cat([weight * one.scale * one.left.float() for weight, one in parts], dim=1)
        right = torch.cat([one.right.float() for _, one in parts], dim=0)
        module = name.removesuffix(".weight")
        if config.get("fan_in_fan_out"):
            left, right = right.T, left.T
        tensors[f"base_model.model.{module}.lora_A.weight"] = right.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = left.contiguous()
        ranks[module] = sum(one.rank for _, one in parts)
    rank = max(ranks.values())
    other = {module: own for module, own in ranks.items() if own != rank}
    settings = {
        **config,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": other,
        "use_rslora": False,
        "target_modules": sorted(ranks),
        # Every module is named in full: what else chooses modules would only get in the way.
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "lora_dropout": 0.0,
        "modules_to_save": None,
    }
    return tensors, settings


def _load(path: Path) -> dict[str, Tensor]:
    read_header(path)
    return dict(load(path.read_bytes()))
