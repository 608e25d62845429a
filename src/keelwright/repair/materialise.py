# SPDX-License-Identifier: Apache-2.0
"""`repair`: one edit with given settings, written as a checkpoint, or as an adapter where it is one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keelwright.core.catalogue import MethodLine, find_method
from keelwright.core.config import require_choice
from keelwright.core.errors import ConfigError, ModelMismatchError
from keelwright.core.files import require_new_folder
from keelwright.core.protocols import Progress, Silent, TensorSource, WeightEdit
from keelwright.models.compatibility import require_compatible
from keelwright.models.loading import LoadedModel
from keelwright.models.refs import LocalModel, ModelRef, parse_ref, resolve
from keelwright.models.sources import open_source
from keelwright.weights.adapter import adapter_terms, write_adapter
from keelwright.weights.card import CardResults, Provenance
from keelwright.weights.live import LiveSource
from keelwright.weights.plan import MAX_SHARD_BYTES, plan_edit
from keelwright.weights.sources import relative_distance
from keelwright.weights.write import Manifest, materialise

OutputForm = Literal["auto", "full", "adapter"]

UNRELATED_ABOVE = 0.5
"""Relative distance from which two models are taken to have no common parent; tuning moves weights by far less."""


@dataclass(frozen=True, slots=True)
class Output:
    """How and where an edit is written."""

    out: Path
    form: OutputForm = "auto"
    """`auto`: an adapter when the tuned model is one and the edit allows it."""
    max_shard_bytes: int = MAX_SHARD_BYTES


def repair(
    method: str,
    *,
    aligned: str | Path | ModelRef | LoadedModel,
    tuned: str | Path | ModelRef | LoadedModel,
    unaligned: str | Path | ModelRef | LoadedModel | None = None,
    coefficient: float | None = None,
    out: str | Path,
    offline: bool = False,
    max_shard_bytes: int | None = None,
    force: bool = False,
    output_form: OutputForm = "auto",
    allow_template_change: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Apply one repair and write the result; no forward pass, no safety evaluation.

    Args:
        method: Name of a repair method.
        aligned, tuned, unaligned: Models by role, in any form of a reference.
        coefficient: The method's coefficient; None takes its default.
        out: Output folder; must not exist, or be empty.
        offline: Never ask the hub.
        max_shard_bytes: Most bytes of weights per file; None means 5 GB.
        force: Go on although the models look unrelated.
        output_form: `full`, `adapter`, or `auto`: an adapter when the tuned model is one and the edit allows it.
        allow_template_change: Accept different chat templates.
        progress: Where to tell what is going on.

    Returns:
        `{"schema", "command", "method", "coefficients", "out", "form", "files", "tensors", "bytes", "seconds"}`.

    Raises:
        ModelMismatchError: The models do not fit together, or look unrelated.
        KeelwrightError: Whatever else is wrong with the models, the settings or the disk.
    """
    require_choice("output_form", output_form, ("auto", "full", "adapter"))
    progress = progress or Silent()
    line = find_method(method, room="repair")
    edit_class = line.load()
    settings = {} if coefficient is None else {"coefficient": float(coefficient)}
    edit = edit_class(edit_class.config_class(**settings))
    require_new_folder(Path(out), flag="--out")
    given = {"aligned": aligned, "unaligned": unaligned, "tuned": tuned}
    refs = {role: parse_ref(model) for role, model in given.items() if model is not None}
    _require_roles(line, edit, refs)
    locals_ = {role: None if ref.live is not None else resolve(ref, offline=offline) for role, ref in refs.items()}
    for role, local in locals_.items():
        other = locals_["tuned"]
        if role != "tuned" and local is not None and other is not None:
            require_compatible(local, other, (role, "tuned"), allow_template_change=allow_template_change)
    sources = {role: _source(refs[role], local) for role, local in locals_.items()}
    if not force:
        _require_related(sources)
    folders = {role: local.folder for role, local in locals_.items() if local is not None}
    target = Output(Path(out), output_form, MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes)
    owner = locals_["tuned"] or refs["tuned"].live
    return materialise_edit(line, edit, sources, owner, target, folders=folders, progress=progress)


def materialise_edit(
    line: MethodLine,
    edit: WeightEdit,
    sources: Mapping[str, TensorSource],
    tuned: LocalModel | LoadedModel | None,
    output: Output,
    *,
    results: CardResults | None = None,
    folders: Mapping[str, Path] | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Write an edit whose sources are open.

    Args:
        line: The method's catalogue line.
        edit: The edit.
        sources: Tensors by role.
        tuned: The tuned model's files, or the live model: where config and tokenizer come from.
        output: Where and how.
        results: Safety figures for the model card; None where nothing was measured.
        folders: By role: the folder whose card names a licence. Models in memory have none.
        progress: Told about every tensor.
    """
    coefficients = {"coefficient": float(edit.config.coefficient)}  # type: ignore[attr-defined]
    provenance = Provenance(
        method=line.name,
        title=line.title,
        citation=line.source,
        status=line.status,
        coefficients=coefficients,
        folders=folders or {},
        results=results,
    )
    terms = adapter_terms(edit, sources) if output.form != "full" else None
    like = tuned.adapter_folders[-1] if isinstance(tuned, LocalModel) and len(tuned.adapter_folders) == 1 else None
    if output.form == "adapter" and (terms is None or like is None):
        raise ConfigError(
            f"'{line.name}' on these models is no adapter.",
            expected="a tuned model that is one adapter on the aligned model, and adapters or the base for the rest",
            found=", ".join(f"{role}: {source.describe()}" for role, source in sources.items()),
            fix="leave the output form to auto, or ask for full",
        )
    if terms is not None and like is not None:
        form = "adapter"
        manifest = write_adapter(edit, sources, terms, output.out, like=like, provenance=provenance)
    else:
        form = "full"
        manifest = _write_full(edit, sources, tuned, output, provenance, progress)
    return {
        "schema": 1,
        "command": "repair",
        "method": line.name,
        "coefficients": coefficients,
        "out": str(manifest.folder),
        "form": form,
        "files": dict(manifest.files),
        "tensors": manifest.tensors,
        "bytes": manifest.bytes,
        "seconds": round(manifest.seconds, 3),
    }


def _write_full(
    edit: WeightEdit,
    sources: Mapping[str, TensorSource],
    tuned: LocalModel | LoadedModel | None,
    output: Output,
    provenance: Provenance,
    progress: Progress,
) -> Manifest:
    plan = plan_edit(edit, sources, max_shard_bytes=output.max_shard_bytes, out=output.out)
    progress.plan("write", plan.describe())
    if isinstance(tuned, LocalModel):
        return materialise(
            plan,
            output.out,
            companions_from=tuned.folder,
            tokenizer_from=tuned.tokenizer_folder,
            provenance=provenance,
            progress=progress,
        )
    if tuned is None:
        raise TypeError("a tuned model has files or is live")
    with tempfile.TemporaryDirectory(prefix="keelwright-") as place:
        tuned.module.config.save_pretrained(place)
        if tuned.module.generation_config is not None:
            tuned.module.generation_config.save_pretrained(place)
        tuned.tokenizer.save_pretrained(place)
        return materialise(plan, output.out, companions_from=Path(place), provenance=provenance, progress=progress)


def _source(ref: ModelRef, local: LocalModel | None) -> TensorSource:
    if ref.live is not None:
        return LiveSource(ref.live.module, ref.text)
    if local is None:
        raise TypeError(f"'{ref.text}' has neither files nor a live module")
    return open_source(local)


def _require_roles(line: MethodLine, edit: WeightEdit, refs: Mapping[str, ModelRef]) -> None:
    unread = [role for role in refs if role not in edit.roles()]
    if unread:
        raise ConfigError(
            f"The method '{line.name}' does not read a model for '{unread[0]}'.",
            expected=f"models for {', '.join(edit.roles())}",
            found=f"models for {', '.join(refs)}",
            fix=f"leave out --{unread[0]}, or choose another method",
        )
    missing = [role for role in edit.roles() if role not in refs]
    if missing:
        raise ConfigError(
            f"The method '{line.name}' needs a model for '{missing[0]}'.",
            expected=f"models for {', '.join(edit.roles())}",
            found=f"models for {', '.join(refs)}",
            fix=f"pass --{missing[0]}",
        )


def _require_related(sources: Mapping[str, TensorSource]) -> None:
    for role, source in sources.items():
        if role == "tuned":
            continue
        distance = relative_distance(source, sources["tuned"])
        if distance > UNRELATED_ABOVE:
            raise ModelMismatchError(
                f"'{role}' and 'tuned' do not look like parent and child.",
                expected=f"weights within {UNRELATED_ABOVE:g} of each other, relative to their size",
                found=f"{distance:.2f} (sampled) between {source.describe()} and {sources['tuned'].describe()}",
                fix="pass the model that was tuned, not another of its family; --force goes on all the same",
            )
