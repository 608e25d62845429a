# SPDX-License-Identifier: Apache-2.0
"""`repair`: one edit with given settings, written as a checkpoint, or as an adapter where it is one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keelwright.core.catalogue import MethodLine, find_method
from keelwright.core.config import require_choice
from keelwright.core.errors import ConfigError, ModelMismatchError
from keelwright.core.files import require_new_folder
from keelwright.core.protocols import Progress, Reach, Silent, TensorSource, WeightEdit
from keelwright.models.compatibility import require_compatible
from keelwright.models.refs import LocalModel, ModelRef, parse_ref, resolve
from keelwright.models.sources import open_source
from keelwright.repair.build import build_edit, coefficients_of, settings_of, tuned_role
from keelwright.repair.prepare import Learning, forget_learning, prepared_edits, require_rows
from keelwright.weights.adapter import adapter_terms, write_adapter
from keelwright.weights.card import CardResults, Provenance
from keelwright.weights.edit import TUNED
from keelwright.weights.live import LiveSource
from keelwright.weights.plan import MAX_SHARD_BYTES, Plan, plan_edit
from keelwright.weights.sources import relative_distance
from keelwright.weights.stream import copied_role, effective_reach
from keelwright.weights.write import Effort, Manifest, materialise_sweep

if TYPE_CHECKING:
    from keelwright.models.loading import LoadedModel

OutputForm = Literal["auto", "full", "adapter"]

_REACHES = {
    Reach.POINTWISE: "element by element",
    Reach.REDUCED: "element by element, after a pass over the tensor",
    Reach.ROWS: "row by row",
    Reach.MATRIX: "the whole matrix at once",
}

UNRELATED_ABOVE = 0.5
"""Relative distance from which two models are taken to have no common parent; tuning moves weights by far less."""


@dataclass(frozen=True, slots=True)
class Output:
    """How and where an edit is written."""

    out: Path
    form: OutputForm = "auto"
    """`auto`: an adapter when the tuned model is one and the edit allows it."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    dtype: str | None = None
    """Dtype of the output's weights as safetensors spells it; None: the tuned model's."""
    effort: Effort = field(default_factory=Effort)


def repair(
    method: str,
    *,
    tuned: str | Path | ModelRef | LoadedModel | Sequence[str | Path | ModelRef | LoadedModel] = (),
    aligned: str | Path | ModelRef | LoadedModel | None = None,
    unaligned: str | Path | ModelRef | LoadedModel | None = None,
    base: str | Path | ModelRef | LoadedModel | None = None,
    reference: str | Path | ModelRef | LoadedModel | None = None,
    coefficient: float | Sequence[float] | None = None,
    settings: Mapping[str, Any] | None = None,
    rows: Mapping[str, str | Path] | None = None,
    out: str | Path | None = None,
    offline: bool = False,
    max_shard_bytes: int | None = None,
    force: bool = False,
    output_form: OutputForm = "auto",
    out_dtype: str | None = None,
    allow_template_change: bool = False,
    explain: bool = False,
    device: str = "auto",
    seed: int = 0,
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Apply one repair and write the result, without a safety evaluation.

    Args:
        method: Name of a repair method.
        tuned: The tuned model in any form of a reference; a list for methods that take several.
        aligned, unaligned, base, reference: Further models by role.
        coefficient: The method's coefficient; None takes its default. Several write one output each, from one reading
            of the models, into `out/coefficient-VALUE`.
        settings: Further fields of the method's config.
        rows: For methods that learn or measure first: JSON-lines files by what they hold, `preferences`,
            `safety_rows` or `examples`. The tuned model is then loaded.
        out: Output folder; must not exist, or be empty. Not needed with `explain`.
        offline: Never ask the hub.
        max_shard_bytes: Most bytes of weights per file; None means 5 GB.
        force: Go on although the models look unrelated.
        output_form: `full`, `adapter`, or `auto`: an adapter when the tuned model is one and the edit allows it.
        out_dtype: BF16, F16, F32 or F64; None keeps the tuned model's dtypes.
        allow_template_change: Accept different chat templates.
        explain: Write nothing and return the plan.
        device, seed: For methods that learn first; the seed also for methods that draw random masks.
        effort: How much of the machine to use.
        progress: Where to tell what is going on.

    Returns:
        `{"schema", "command", "method", "coefficients", "out", "form", "files", "tensors", "bytes", "seconds"}`, with
        `outputs` instead of the last four where several coefficients were given, and with `plan` (rows of group and
        text) instead of all that with `explain`.

    Raises:
        ModelMismatchError: The models do not fit together, or look unrelated.
        KeelwrightError: Whatever else is wrong with the models, the settings or the disk.
    """
    require_choice("output_form", output_form, ("auto", "full", "adapter"))
    if out is None and not explain:
        raise ConfigError("There is no place for the output.", expected="out", found="nothing", fix="pass out")
    line = find_method(method, room="repair")
    several: list[Any] = list(tuned) if isinstance(tuned, (list, tuple)) else [tuned]
    given: dict[str, Any] = {"aligned": aligned, "unaligned": unaligned, "base": base, "reference": reference}
    given.update({tuned_role(number): model for number, model in enumerate(several, start=1)})
    given = {role: model for role, model in given.items() if model is not None}
    target = Output(
        Path(out or "out"),
        output_form,
        MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes,
        out_dtype,
        effort or Effort(),
    )
    learning = Learning({name: Path(path) for name, path in (rows or {}).items()}, device, offline, seed)
    edits = _edits(line, coefficient, settings or {}, given, seed=seed)
    require_rows(line, edits[0], learning.files)
    if not explain:
        require_new_folder(target.out, flag="--out")
    refs = {role: parse_ref(model) for role, model in given.items()}
    _require_roles(line, edits[0], refs)
    locals_ = {role: None if ref.live is not None else resolve(ref, offline=offline) for role, ref in refs.items()}
    _require_compatible(locals_, allow_template_change=allow_template_change)
    sources = {role: _source(refs[role], local) for role, local in locals_.items()}
    if not force:
        _require_related(sources)
    if explain:
        return {"schema": 1, "command": "repair", "method": line.name, "plan": _plan_rows(line, edits[0], sources)}
    return _write(line, edits, refs, locals_, sources, target, learning, progress or Silent())


def _edits(
    line: MethodLine,
    coefficient: float | Sequence[float] | None,
    settings: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    seed: int,
) -> list[WeightEdit]:
    """Return the method's edit for each coefficient."""
    values: list[Any] = list(coefficient) if isinstance(coefficient, (list, tuple)) else [coefficient]
    takes_seed = "seed" in {one.name for one in fields(line.load().config_class)}
    plain = {**({"seed": seed} if takes_seed else {}), **settings}
    return [
        build_edit(
            line,
            plain if value is None else {**plain, "coefficient": float(value)},
            models=sum(role.startswith(TUNED) for role in given),
            roles=given,
        )
        for value in values
    ]


def _write(
    line: MethodLine,
    edits: Sequence[WeightEdit],
    refs: Mapping[str, ModelRef],
    locals_: Mapping[str, LocalModel | None],
    sources: Mapping[str, TensorSource],
    target: Output,
    learning: Learning,
    progress: Progress,
) -> dict[str, Any]:
    edits = prepared_edits(edits, sources, refs, learning, out=target.out, progress=progress)
    folders = {role: local.folder for role, local in locals_.items() if local is not None}
    layout = edits[0].roles()[-1]
    owner = locals_[layout] or refs[layout].live
    if len(edits) == 1:
        result = materialise_edit(line, edits[0], sources, owner, target, folders=folders, progress=progress)
    else:
        result = _materialise_several(line, edits, sources, owner, target, folders=folders, progress=progress)
    forget_learning(target.out)
    return result


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
    provenance = _provenance(line, edit, results, folders)
    adapter = _adapter_form(line, edit, sources, tuned, output)
    if adapter is not None:
        terms, like = adapter
        manifest = write_adapter(edit, sources, terms, output.out, like=like, provenance=provenance)
    else:
        (manifest,) = _write_full([edit], sources, tuned, output, [output.out], [provenance], progress)
    return {
        "schema": 1,
        "command": "repair",
        "method": line.name,
        "coefficients": coefficients_of(edit),
        **_written(manifest, "full" if adapter is None else "adapter"),
    }


def _plan_rows(line: MethodLine, edit: WeightEdit, sources: Mapping[str, TensorSource]) -> list[list[str]]:
    """Return what becomes of every group of tensors, from headers alone."""
    entries = sources[edit.roles()[-1]].entries().values()
    groups: dict[tuple[str, str], int] = {}
    for entry in entries:
        name = ".".join("*" if part.isdigit() else part for part in entry.name.split("."))
        reach = effective_reach(edit, entry)
        what = f"copied from {copied_role(edit, entry)}" if reach is Reach.COPY else f"computed ({_REACHES[reach]})"
        groups[name, f"{what}, reads {', '.join(edit.reads(entry.name))}"] = groups.get((name, what), 0) + 1
    settings = ", ".join(f"{name} {value}" for name, value in settings_of(edit).items())
    head = [["method", f"{line.name}: {settings}"], *([role, source.describe()] for role, source in sources.items())]
    return [*head, *([name, what] for name, what in groups)]


def _materialise_several(
    line: MethodLine,
    edits: Sequence[WeightEdit],
    sources: Mapping[str, TensorSource],
    tuned: LocalModel | LoadedModel | None,
    output: Output,
    *,
    folders: Mapping[str, Path],
    progress: Progress,
) -> dict[str, Any]:
    """Write one output per coefficient below `output.out`: full ones from one reading of the models."""
    values = [coefficients_of(edit)["coefficient"] for edit in edits]
    outs = [output.out / f"coefficient-{value:g}" for value in values]
    if len(set(outs)) != len(outs):
        raise ConfigError(
            "Two coefficients of the sweep are the same.",
            expected="different numbers",
            found=", ".join(f"{value:g}" for value in values),
            fix="write each once",
        )
    provenances = [_provenance(line, edit, None, folders) for edit in edits]
    forms = [_adapter_form(line, edit, sources, tuned, output) for edit in edits]
    if all(form is not None for form in forms):
        manifests = [
            write_adapter(edit, sources, form[0], place, like=form[1], provenance=one)
            for edit, form, place, one in zip(edits, forms, outs, provenances, strict=True)
            if form is not None
        ]
        form_name = "adapter"
    else:
        manifests = _write_full(edits, sources, tuned, output, outs, provenances, progress)
        form_name = "full"
    rows = [
        {"coefficients": coefficients_of(edit), **_written(manifest, form_name)}
        for edit, manifest in zip(edits, manifests, strict=True)
    ]
    return {"schema": 1, "command": "repair", "method": line.name, "out": str(output.out), "outputs": rows}


def _provenance(
    line: MethodLine, edit: WeightEdit, results: CardResults | None, folders: Mapping[str, Path] | None
) -> Provenance:
    settings = settings_of(edit)
    return Provenance(
        method=line.name,
        title=line.title,
        citation=line.source,
        status=line.status,
        coefficients=coefficients_of(edit),
        settings=settings,
        folders=folders or {},
        results=results,
        seed=settings.get("seed"),
    )


def _written(manifest: Manifest, form: str) -> dict[str, Any]:
    return {
        "out": str(manifest.folder),
        "form": form,
        "files": dict(manifest.files),
        "tensors": manifest.tensors,
        "bytes": manifest.bytes,
        "seconds": round(manifest.seconds, 3),
    }


def _adapter_form(
    line: MethodLine,
    edit: WeightEdit,
    sources: Mapping[str, TensorSource],
    tuned: LocalModel | LoadedModel | None,
    output: Output,
) -> tuple[list[Any], Path] | None:
    """Return the adapters of the sum and the folder whose settings are kept; None where a full model is written."""
    terms = adapter_terms(edit, sources) if output.form != "full" else None
    like = tuned.adapter_folders[-1] if isinstance(tuned, LocalModel) and len(tuned.adapter_folders) == 1 else None
    if terms is not None and like is not None and output.dtype is None:
        return terms, like
    if output.form == "adapter":
        raise ConfigError(
            f"'{line.name}' on these models is no adapter.",
            expected="a tuned model that is one adapter on the aligned model, and adapters or the base for the rest",
            found=", ".join(f"{role}: {source.describe()}" for role, source in sources.items()),
            fix="leave the output form to auto, or ask for full",
        )
    return None


def _write_full(
    edits: Sequence[WeightEdit],
    sources: Mapping[str, TensorSource],
    tuned: LocalModel | LoadedModel | None,
    output: Output,
    outs: Sequence[Path],
    provenances: Sequence[Provenance],
    progress: Progress,
) -> list[Manifest]:
    plans: list[Plan] = []
    for edit, out in zip(edits, outs, strict=True):
        digests = plans[0].source_digests if plans else None
        plans.append(
            plan_edit(
                edit,
                sources,
                max_shard_bytes=output.max_shard_bytes,
                out=out,
                out_dtype=output.dtype,
                digests=digests,
            )
        )
    rows = plans[0].describe()
    if len(plans) > 1:
        rows.append(("outputs", f"{len(plans)}, from one reading of the models"))
    progress.plan("write", rows)
    with _companions(tuned) as (model_folder, tokenizer_folder):
        return materialise_sweep(
            plans,
            outs,
            companions_from=model_folder,
            tokenizer_from=tokenizer_folder,
            provenances=provenances,
            progress=progress,
            effort=output.effort,
        )


@contextmanager
def _companions(tuned: LocalModel | LoadedModel | None) -> Iterator[tuple[Path, Path]]:
    """Give the folders of the tuned model's config and tokenizer; those of a model in memory are saved first."""
    if isinstance(tuned, LocalModel):
        yield tuned.folder, tuned.tokenizer_folder
        return
    if tuned is None:
        raise TypeError("a tuned model has files or is live")
    with tempfile.TemporaryDirectory(prefix="keelwright-") as place:
        tuned.module.config.save_pretrained(place)
        if tuned.module.generation_config is not None:
            tuned.module.generation_config.save_pretrained(place)
        tuned.tokenizer.save_pretrained(place)
        yield Path(place), Path(place)


def _require_compatible(locals_: Mapping[str, LocalModel | None], *, allow_template_change: bool) -> None:
    tuned = locals_.get(TUNED)
    for role, local in locals_.items():
        if role == TUNED or local is None or tuned is None:
            continue
        # A model from before alignment has no chat template to agree with.
        allowed = allow_template_change or role == "base"
        require_compatible(local, tuned, (role, TUNED), allow_template_change=allowed)


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
        # Alignment itself may move a model from before it that far.
        if role in (TUNED, "base") or TUNED not in sources:
            continue
        distance = relative_distance(source, sources[TUNED])
        if distance > UNRELATED_ABOVE:
            raise ModelMismatchError(
                f"'{role}' and 'tuned' do not look like parent and child.",
                expected=f"weights within {UNRELATED_ABOVE:g} of each other, relative to their size",
                found=f"{distance:.2f} (sampled) between {source.describe()} and {sources['tuned'].describe()}",
                fix="pass the model that was tuned, not another of its family; --force goes on all the same",
            )
