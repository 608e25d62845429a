# SPDX-License-Identifier: Apache-2.0
"""What an edit will read and write, from headers alone: everything that can fail fails here, before any byte.

Two models must hold the same tensors. The one exception is an output head that one of them ties to its embedding:
it is then read from the embedding, and the output stores it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from keelwright.core.digests import json_digest
from keelwright.core.errors import ConfigError, DataError, ModelMismatchError, StorageError
from keelwright.core.protocols import Reach, TensorEntry, TensorSource, WeightEdit
from keelwright.models.dtypes import TORCH_DTYPES
from keelwright.models.headers import FLOAT_DTYPES, tensor_bytes
from keelwright.models.memory import require_memory, shown_bytes
from keelwright.models.names import tied_tensors
from keelwright.ops import kernels
from keelwright.weights.journal import taken_bytes
from keelwright.weights.layout import Shard, lay_out
from keelwright.weights.sources import AliasedSource, Excerpt, file_stamps, source_digest
from keelwright.weights.stream import CHUNK_ELEMENTS, effective_reach

MAX_SHARD_BYTES = 5_000_000_000

OUTPUT_DTYPES = ("BF16", "F16", "F32", "F64")

_HEAD = "lm_head.weight"
_EMBEDDING_ENDS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
# What is copied beside the weights, and a margin for the file system.
_SPARE_BYTES = 50_000_000
# Arrays of a chunk in float32 beside one per role: the result, two temporaries, the rounded result.
_TEMPORARIES = 4


@runtime_checkable
class Configured(Protocol):
    """A source that has a `config.json`, such as a checkpoint on disk."""

    def config_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Planned:
    """One output tensor and how it is made."""

    entry: TensorEntry
    reach: Reach


@dataclass(frozen=True, slots=True)
class Plan:
    """A weight edit that is known to fit its inputs and the machine."""

    edit: WeightEdit
    sources: Mapping[str, TensorSource]
    """By role; tied tensors readable under every name that the output stores."""
    tensors: tuple[Planned, ...]
    shards: tuple[Shard, ...]
    memory_bytes: int
    digest: str
    """Of the edit, its settings, the layout and the content of every input."""
    source_digests: Mapping[str, str]
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `config.json` that the output must state differently from the tuned model."""
    generation_changes: Mapping[str, Any] = field(default_factory=dict)
    """The same of `generation_config.json`."""
    notes: tuple[str, ...] = ()
    """What a person should know, one line each."""
    stamps: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Size and time of change of every input file, as they were before the digests were taken."""
    rounding_seed: int | None = None
    """Seed of rounding by chance; None: to nearest."""
    made: frozenset[str] = frozenset()
    """Roles of sources that are no model of the user's: the plan made them itself."""

    @property
    def layout_role(self) -> str:
        """The role that gives the output its names, dtypes and companion files."""
        return self.edit.roles()[-1]

    @property
    def total_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.size for shard in self.shards)

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, without the headers."""
        return sum(tensor_bytes(one.entry) for one in self.tensors)

    def describe(self) -> list[tuple[str, str]]:
        """Return rows of label and text for a person, before anything is done."""
        copied = sum(one.reach is Reach.COPY for one in self.tensors)
        files = f"{len(self.shards)} file{'s' if len(self.shards) > 1 else ''}"
        rows = [(role, self.sources[role].describe()) for role in self.edit.roles() if role not in self.made]
        rows += [
            ("tensors", f"{len(self.tensors)}: {len(self.tensors) - copied} computed, {copied} copied"),
            ("output", f"{shown_bytes(self.total_bytes)} in {files}"),
            ("memory", shown_bytes(self.memory_bytes)),
        ]
        if self.rounding_seed is not None:
            rows.append(("rounding", f"stochastic, seed {self.rounding_seed}"))
        return rows + [("note", note) for note in self.notes]


def plan_edit(
    edit: WeightEdit,
    sources: Mapping[str, TensorSource],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    out: Path | None = None,
    out_dtype: str | None = None,
    digests: Mapping[str, str] | None = None,
    config_changes: Mapping[str, Any] | None = None,
    tied: bool = True,
    rounding_seed: int | None = None,
) -> Plan:
    """Return the plan of an edit, from headers only.

    Non-floating-point buffers, which are small, are the one thing whose values are compared here.

    Args:
        edit: What to do.
        sources: A source for each role of the edit.
        max_shard_bytes: Most bytes of data per output file.
        out: The output folder; when given, its disk must have room.
        out_dtype: Dtype of every output weight, as safetensors spells it; by default that of the layout's role.
        digests: Content digests of the sources by role, where they are known already: those of a plan just made.
        config_changes: Keys of `config.json` that the output must state differently from the layout's model.
        tied: Give every source a head of its own where some tie it; False where the sources are presented that way.
        rounding_seed: Round up or down by chance, drawn from this seed; None: to nearest.

    Raises:
        ConfigError: A role has no source, or the shard limit is not positive.
        ModelMismatchError: Tensors or shapes differ, or a buffer that is no weight has other values.
        DataError: A dtype is not one that weight arithmetic understands.
        ResourceError: Too little memory.
        StorageError: Too little room on the disk.
    """
    _require_roles(edit, sources)
    if max_shard_bytes < 1:
        raise ConfigError(
            "'max_shard_bytes' is out of range.",
            expected="at least 1 byte",
            found=str(max_shard_bytes),
            fix="leave it out for 5 GB",
        )
    sources = {role: sources[role] for role in edit.roles()}
    untied: dict[str, Any] = {}
    notes: list[str] = []
    if tied:
        sources, untied, notes = untie(sources)
    require_readable(edit, sources)
    entries = _output_entries(sources[edit.roles()[-1]].entries(), out_dtype)
    tensors = tuple(Planned(entry, effective_reach(edit, entry)) for entry in entries.values())
    memory = _memory_bytes(tensors, len(sources))
    require_memory(memory, "This edit")
    stamps = {path: stamp for source in sources.values() for path, stamp in file_stamps(source).items()}
    if digests is None:
        with ThreadPoolExecutor() as pool:
            # Hashing leaves the interpreter free: the models are read side by side.
            digests = dict(zip(sources, pool.map(source_digest, sources.values()), strict=True))
    rows = [[entry.name, entry.dtype, list(entry.shape)] for entry in entries.values()]
    # Edits are frozen dataclasses: their repr holds the method and every setting.
    # Sums over a whole tensor may differ in their last digit between compiled and plain loops.
    rounding = [] if rounding_seed is None else [f"stochastic rounding, seed {rounding_seed}"]
    digest = json_digest([repr(edit), sorted(rows), dict(digests), max_shard_bytes, kernels.kind(), *rounding])
    metadata = {"format": "pt", "keelwright": digest}
    shards = lay_out(entries.values(), max_shard_bytes=max_shard_bytes, metadata=metadata)
    changes = {**(config_changes or {}), **untied}
    plan = Plan(
        edit, sources, tensors, shards, memory, digest, digests, changes, {}, tuple(notes), stamps, rounding_seed
    )
    if out is not None:
        require_space(plan, out)
    return plan


def untie(
    sources: Mapping[str, TensorSource],
) -> tuple[dict[str, TensorSource], dict[str, Any], list[str]]:
    """Give every source a head of its own where some tie it to the embedding and some do not.

    Args:
        sources: By role; the last one lays out the output.

    Returns:
        The sources, what changes in the output's `config.json`, and notes for a person.
    """
    every = {name for source in sources.values() for name in source.entries()}
    ties = {role: ties_of(source) for role, source in sources.items()}
    aliases: dict[str, dict[str, str]] = {role: {} for role in sources}
    hidden: dict[str, list[str]] = {role: [] for role in sources}
    notes: list[str] = []
    for name in sorted({name for pairs in ties.values() for name in pairs} & every):
        storing = [role for role, source in sources.items() if name in source.entries() and name not in ties[role]]
        for role, source in sources.items():
            if name not in ties[role]:
                continue
            if storing:
                aliases[role][name] = ties[role][name]
                notes.append(
                    f"'{role}' ties {name} to {ties[role][name]} and '{storing[0]}' does not: the output stores both"
                )
            elif name in source.entries():
                hidden[role].append(name)
                notes.append(f"'{role}' stores a second copy of its tied {name}, which loaders ignore; it is left out")
    result = {
        role: AliasedSource(source, aliases[role], hidden=hidden[role]) if aliases[role] or hidden[role] else source
        for role, source in sources.items()
    }
    layout = [*sources][-1]
    changes = {"tie_word_embeddings": False} if aliases[layout] else {}
    return result, changes, notes


def require_same_tensors(sources: Mapping[str, TensorSource], *, layout: str) -> None:
    """Raise unless every source holds the tensors of the layout's, in usable dtypes.

    Raises:
        ModelMismatchError: Names or shapes differ, or a buffer that is no weight has other values.
        DataError: A dtype is not one that weight arithmetic understands.
    """
    for role, source in sources.items():
        for entry in source.entries().values():
            if entry.dtype not in TORCH_DTYPES or entry.dtype.startswith(("F8", "C")):
                raise DataError(
                    f"Tensor '{entry.name}' of '{role}' has a dtype that weight arithmetic does not understand.",
                    expected=f"one of {', '.join(sorted(FLOAT_DTYPES))}, or integers that are copied",
                    found=f"{entry.dtype} in {source.describe()}",
                    fix="use the unquantised model that it was made from",
                )
    for role, source in sources.items():
        if role == layout:
            continue
        _require_same_names(role, source, layout, sources[layout])
        _require_same_kinds(role, source, layout, sources[layout])


def require_readable(edit: WeightEdit, sources: Mapping[str, TensorSource]) -> None:
    """Raise unless every tensor of the output can be read from every role that the edit reads for it.

    An edit that reads all of its roles for every tensor needs models with the same tensors. One that reads some roles
    for some tensors only needs those; what else a source holds is left out.

    Raises:
        ModelMismatchError: A tensor is missing, has another shape, or is a buffer with other values.
        DataError: A dtype is not one that weight arithmetic understands.
    """
    layout = edit.roles()[-1]
    names = sources[layout].entries()
    if all(edit.reads(name) == edit.roles() for name in names):
        require_same_tensors(sources, layout=layout)
        return
    for name, entry in names.items():
        reads = edit.reads(name)
        for role in reads:
            found = sources[role].entries().get(name)
            if found is None:
                raise ModelMismatchError(
                    f"'{role}' lacks a tensor that the edit reads.",
                    expected=f"{name} {list(entry.shape)} in {sources[role].describe()}",
                    found="no tensor of that name",
                    fix="pass a model of the same architecture and size",
                )
            # The source's own names stand in error texts: a part of a model may be read under another name.
            require_same_tensors(
                {role: Excerpt(sources[role], [name]), "": Excerpt(sources[reads[0]], [name])}, layout=""
            )
            if found.shape != entry.shape:
                raise ModelMismatchError(
                    f"'{role}' has a tensor of another shape than the output.",
                    expected=f"{name} {list(entry.shape)}",
                    found=f"{list(found.shape)} in {sources[role].describe()}",
                    fix="pass a model of the same size and vocabulary",
                )


def _output_entries(entries: Mapping[str, TensorEntry], dtype: str | None) -> dict[str, TensorEntry]:
    """Return the output's tensors: those of the layout, weights in another dtype where one is asked for."""
    if dtype is None:
        return dict(entries)
    if dtype not in OUTPUT_DTYPES:
        raise ConfigError(
            "'out_dtype' is not a dtype that weights are written in.",
            expected=f"one of {', '.join(OUTPUT_DTYPES)}",
            found=dtype,
            fix="leave it out to keep the tuned model's",
        )
    return {
        name: TensorEntry(name, dtype, entry.shape) if entry.dtype in FLOAT_DTYPES else entry
        for name, entry in entries.items()
    }


def require_space(plan: Plan, out: Path) -> None:
    """Raise `StorageError` when the disk of `out` lacks room for the plan.

    Args:
        plan: The plan.
        out: The output folder, which need not exist. What an interrupted write has taken already is not counted.
    """
    place = out.absolute()
    while not place.exists():
        place = place.parent
    needed = max(0, plan.total_bytes - taken_bytes(out)) + _SPARE_BYTES
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StorageError(
            f"The disk that holds '{out}' has too little room.",
            expected=f"{shown_bytes(needed)} free",
            found=f"{shown_bytes(free)} free",
            fix="free some space, or write to another disk",
        )


def _require_roles(edit: WeightEdit, sources: Mapping[str, TensorSource]) -> None:
    missing = [role for role in edit.roles() if role not in sources]
    if missing:
        raise ConfigError(
            f"The edit needs a model for '{missing[0]}'.",
            expected=f"models for {', '.join(edit.roles())}",
            found=f"models for {', '.join(sources) or 'nothing'}",
            fix=f"pass --{missing[0]}",
        )


def ties_of(source: TensorSource) -> dict[str, str]:
    """Return tied names with the stored name of each, from the settings or, where there are none, from the names."""
    pairs = tied_tensors(source.config_json()) if isinstance(source, Configured) else {}
    if not pairs and _HEAD not in source.entries():
        embedding = next((name for name in source.entries() if name.endswith(_EMBEDDING_ENDS)), None)
        pairs = {_HEAD: embedding} if embedding is not None else {}
    return {name: stored for name, stored in pairs.items() if stored in source.entries()}


def _require_same_names(role: str, source: TensorSource, layout: str, reference: TensorSource) -> None:
    own, wanted = source.entries(), reference.entries()
    if own.keys() == wanted.keys():
        return
    only_role = [name for name in own if name not in wanted]
    only_layout = [name for name in wanted if name not in own]
    parts = [
        f"only in '{where}': {_shown(names)}" for where, names in ((role, only_role), (layout, only_layout)) if names
    ]
    found = ((role, only_role), (layout, only_layout))
    unmerged = [where for where, names in found if any("lora_" in name for name in names)]
    if unmerged:
        whole = reference if unmerged[0] == role else source
        part = source if unmerged[0] == role else reference
        fix = f"'{unmerged[0]}' looks like an adapter: pass it as {whole.describe()}+{part.describe()}"
    else:
        fix = "pass two models of the same architecture and size, one tuned from the other"
    raise ModelMismatchError(
        f"'{role}' and '{layout}' do not have the same tensors.",
        expected=f"{len(own)} tensors as in '{role}' ({source.describe()})",
        found=f"{len(wanted)} in '{layout}' ({reference.describe()}); {'; '.join(parts)}",
        fix=fix,
    )


def _require_same_kinds(role: str, source: TensorSource, layout: str, reference: TensorSource) -> None:
    own, wanted = source.entries(), reference.entries()
    shapes = [name for name in own if own[name].shape != wanted[name].shape]
    if shapes:
        name = shapes[0]
        more = f" and {len(shapes) - 1} more tensors" if len(shapes) > 1 else ""
        raise ModelMismatchError(
            f"'{role}' and '{layout}' have tensors of different shapes.",
            expected=f"{name} {list(own[name].shape)} as in '{role}' ({source.describe()})",
            found=f"{list(wanted[name].shape)} in '{layout}' ({reference.describe()}){more}",
            fix="pass two models of the same size and vocabulary, one tuned from the other",
        )
    for name, entry in own.items():
        if (entry.dtype in FLOAT_DTYPES) != (wanted[name].dtype in FLOAT_DTYPES) or not (
            entry.dtype in FLOAT_DTYPES or _same_values(name, source, reference)
        ):
            raise ModelMismatchError(
                f"'{role}' and '{layout}' differ in '{name}', which is not made of weights.",
                expected=f"{entry.dtype} with the values of '{role}' ({source.describe()})",
                found=f"{wanted[name].dtype} with other values in '{layout}' ({reference.describe()})",
                fix="pass two models made by the same version of the same code",
            )


def _same_values(name: str, source: TensorSource, reference: TensorSource) -> bool:
    entry, other = source.entries()[name], reference.entries()[name]
    if entry.dtype != other.dtype:
        return False
    return all(
        torch.equal(
            source.read(name, start, min(entry.elements, start + CHUNK_ELEMENTS)),
            reference.read(name, start, min(entry.elements, start + CHUNK_ELEMENTS)),
        )
        for start in range(0, entry.elements, CHUNK_ELEMENTS)
    )


def _memory_bytes(tensors: tuple[Planned, ...], roles: int) -> int:
    def needed(one: Planned) -> int:
        elements = one.entry.elements if one.reach is Reach.MATRIX else min(one.entry.elements, CHUNK_ELEMENTS)
        width = 8 if one.entry.dtype == "F64" else 4
        # Each role once as stored and once widened.
        return elements * width * (2 * roles + _TEMPORARIES)

    return max((needed(one) for one in tensors), default=0)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
