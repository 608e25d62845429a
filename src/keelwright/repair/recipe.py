# SPDX-License-Identifier: Apache-2.0
"""`repair RECIPE.yaml`: a recipe of ours or of mergekit, planned tensor by tensor and written."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from keelwright.core.catalogue import find_method
from keelwright.core.errors import ConfigError
from keelwright.core.files import require_new_folder
from keelwright.core.protocols import Progress, Silent, TensorEntry, TensorSource
from keelwright.models.dtypes import STORED_NAMES, TORCH_DTYPES
from keelwright.models.headers import FLOAT_DTYPES
from keelwright.models.names import tied_tensors
from keelwright.models.refs import LocalModel, parse_ref, resolve
from keelwright.models.sources import open_source
from keelwright.repair.build import build_edit
from keelwright.repair.format import Format
from keelwright.repair.tokens import Tokens, fit_tokens
from keelwright.weights.card import Provenance
from keelwright.weights.edit import model_roles
from keelwright.weights.piecewise import LAYOUT, Blueprint, Part, Piecewise
from keelwright.weights.plan import MAX_SHARD_BYTES, Configured, plan_edit
from keelwright.weights.recipes.explain import describe
from keelwright.weights.recipes.layers import layout_of
from keelwright.weights.recipes.plan import Expansion, expand
from keelwright.weights.recipes.reader import read_recipe
from keelwright.weights.recipes.recipe import Recipe, TensorTask
from keelwright.weights.requantise import plan_requantised
from keelwright.weights.sources import RenamedSource
from keelwright.weights.vocabulary import Policy
from keelwright.weights.write import Effort, materialise

_ALIGNED = "aligned"


@dataclass(frozen=True, slots=True)
class Planned:
    """A recipe with its models open: everything but the writing."""

    recipe: Recipe
    expansion: Expansion
    models: Mapping[str, LocalModel]
    edit: Piecewise
    sources: Mapping[str, TensorSource]
    config_changes: Mapping[str, Any]
    tokens: Tokens
    """The models as they are opened, with what changes with the tokens."""

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan for a person, one row per group of tensors."""
        notes = [("note", note) for note in self.tokens.notes]
        return [*describe(self.recipe, self.expansion), *notes]


def repair_recipe(
    path: str | Path,
    *,
    out: str | Path | None = None,
    offline: bool = False,
    max_shard_bytes: int | None = None,
    seed: int | None = None,
    out_dtype: str | None = None,
    output_format: Format | None = None,
    explain: bool = False,
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write what a recipe says, or say what it would write.

    Args:
        path: The recipe.
        out: Output folder; must not exist, or be empty. Not needed with `explain`.
        offline: Never ask the hub.
        max_shard_bytes: Most bytes of weights per file; None means 5 GB.
        seed: Of random masks, where the recipe names none; None: the recipe's.
        out_dtype: Instead of the recipe's.
        output_format: How it is rounded, and F8; whose tokens it has is the recipe's to say.
        explain: Write nothing and return the plan.
        effort: How much of the machine to use.
        progress: Told about every tensor.

    Returns:
        `{"schema", "command", "method", "recipe", "out", "form", "files", "tensors", "bytes", "seconds"}`; with
        `explain` `{"schema", "command", "method", "recipe", "plan": [[group, text], ...]}`.

    Raises:
        ConfigError: The recipe is wrong, or names something that keelwright does not do.
        ModelMismatchError: Its models do not fit together.
        KeelwrightError: Whatever else is wrong with the models or the disk.
    """
    progress, output_format = progress or Silent(), output_format or Format()
    _require_possible(output_format, out_dtype)
    if out is not None:
        require_new_folder(Path(out), flag="--out")
    with tempfile.TemporaryDirectory(prefix="keelwright-") as place:
        planned = plan_recipe(Path(path), offline=offline, seed=seed, place=Path(place))
        return _carry_out(
            planned,
            path,
            None if explain or out is None else Path(out),
            max_shard_bytes=MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes,
            out_dtype=out_dtype,
            output_format=output_format,
            effort=effort,
            progress=progress,
        )


def _carry_out(
    planned: Planned,
    path: str | Path,
    out: Path | None,
    *,
    max_shard_bytes: int,
    out_dtype: str | None,
    output_format: Format,
    effort: Effort | None,
    progress: Progress,
) -> dict[str, Any]:
    """Write what is planned, or return the plan where there is no place to write to."""
    head = {"schema": 1, "command": "repair", "method": planned.recipe.method, "recipe": str(path)}
    if out is None:
        return {**head, "plan": [list(row) for row in planned.rows()]}
    for text in (*planned.recipe.warnings, *planned.expansion.warnings):
        progress.note(f"warning: {text}")
    common: dict[str, Any] = {
        "max_shard_bytes": max_shard_bytes,
        "out": out,
        "config_changes": planned.config_changes,
        "tied": False,
    }
    if output_format.requantize:
        layout = planned.tokens.sources[planned.recipe.donor]
        plan = plan_requantised(planned.edit, planned.sources, **common, layout=layout, progress=progress)
    else:
        seed = output_format.seed
        plan = plan_edit(planned.edit, planned.sources, **common, out_dtype=out_dtype, rounding_seed=seed)
    plan = replace(
        plan,
        generation_changes=planned.tokens.generation_changes,
        notes=(*plan.notes, *planned.tokens.notes),
        made=plan.made | {LAYOUT},
    )
    progress.plan(f"recipe {planned.recipe.where}", [*planned.rows(), *plan.describe()])
    donor = planned.models[planned.recipe.donor]
    manifest = materialise(
        plan,
        out,
        companions_from=donor.folder,
        tokenizer_from=planned.tokens.tokenizer or donor.tokenizer_folder,
        provenance=_provenance(planned),
        progress=progress,
        effort=effort,
    )
    return {
        **head,
        "out": str(manifest.folder),
        "form": "full",
        "files": dict(manifest.files),
        "tensors": manifest.tensors,
        "bytes": manifest.bytes,
        "seconds": round(manifest.seconds, 3),
    }


def plan_recipe(path: Path, *, offline: bool = False, seed: int | None = None, place: Path) -> Planned:
    """Read a recipe, open its models by their headers and say what becomes of every tensor.

    Args:
        path: The recipe.
        offline: Never ask the hub.
        seed: Of random masks; None: the recipe's.
        place: An empty folder for a tokenizer that no model has.
    """
    recipe = read_recipe(path)
    models = {key: resolve(parse_ref(text), offline=offline) for key, text in recipe.models.items()}
    tokens = _tokens(recipe, models, {key: open_source(local) for key, local in models.items()}, place)
    opened = tokens.sources
    entries = {key: source.entries() for key, source in opened.items()}
    tied = {key: tied_tensors(one.config_json()) for key, one in opened.items() if isinstance(one, Configured)}
    expansion = expand(recipe, entries, tied=tied)
    edit, names = _piecewise(recipe, expansion.tasks, recipe.seed if seed is None else seed)
    output = {task.output_name: _entry(task, entries, recipe.out_dtype) for task in expansion.tasks}
    sources: dict[str, TensorSource] = {role: RenamedSource(opened[role], names[role]) for role in edit.models}
    sources[LAYOUT] = Blueprint(output, f"the output of {recipe.where}")
    # What `_config_changes` says of the donor's settings comes last: it has seen the new number of rows.
    changes = {**tokens.config_changes, **_config_changes(recipe, expansion, opened, output)}
    return Planned(recipe, expansion, models, edit, sources, changes, tokens)


def _tokens(
    recipe: Recipe, models: Mapping[str, LocalModel], opened: Mapping[str, TensorSource], place: Path
) -> Tokens:
    """Return the models with the tokens that the recipe asks for."""
    source = recipe.tokenizer_source
    if source is None and recipe.pad_to_multiple_of is None:
        return Tokens(opened)
    named: dict[str | None, Policy] = {None: "strict", "base": "base", "union": "union"}
    # Our own recipes may call a model `base`.
    policy: Policy = "donor" if source in recipe.models else named.get(source, "donor")
    return fit_tokens(
        opened,
        models,
        place,
        policy=policy,
        layout_role=recipe.donor,
        base_role=recipe.base or recipe.donor,
        donor_role=source if policy == "donor" else None,
        pad_to_multiple_of=recipe.pad_to_multiple_of,
    )


def _require_possible(wanted: Format, out_dtype: str | None) -> None:
    """Raise for what a recipe cannot be given: its tokens are its own, and its output is always full."""
    wanted.require_possible(outputs=1, dtype=out_dtype)
    given = {
        "vocabulary": wanted.vocabulary != "strict",
        "pad_to_multiple_of": wanted.pad_to_multiple_of is not None,
        "rank": wanted.rank is not None,
        "energy": wanted.energy is not None,
    }
    if any(given.values()):
        raise ConfigError(
            "A recipe cannot be given other tokens or a lower rank.",
            expected="tokenizer_source and pad_to_multiple_of in the recipe; an output that is written in full",
            found=", ".join(name for name, is_given in given.items() if is_given),
            fix="change the recipe",
        )


def _piecewise(recipe: Recipe, tasks: tuple[TensorTask, ...], seed: int) -> tuple[Piecewise, dict[str, dict[str, str]]]:
    """Return the edit of all tasks, and for each model which of its tensors is read for each of the output's."""
    parts: dict[tuple[object, ...], int] = {}
    made: list[Part] = []
    places: dict[str, int] = {}
    names: dict[str, dict[str, str]] = {}
    for task in tasks:
        values = task.config_values()
        sides = _sides(recipe, task)
        roles = tuple((own, model) for own, (model, _) in sides)
        key = (task.method, roles, tuple(sorted((name, repr(value)) for name, value in values.items())))
        if key not in parts:
            parts[key] = len(made)
            made.append(Part(_edit_of(task, values, tuple(own for own, _ in sides), seed), roles))
        places[task.output_name] = parts[key]
        for _, (model, tensor) in sides:
            names.setdefault(model, {})[task.output_name] = tensor
    models = tuple(key for key in recipe.models if key in names)
    return Piecewise(tuple(made), places, models), names


def _sides(recipe: Recipe, task: TensorTask) -> list[tuple[str, tuple[str, str]]]:
    """Return the method's role of each model and tensor that the task reads."""
    # Our recipes name roles: linear reads the aligned model as such, and to the reader it is an input like the others.
    own = recipe.format == "own"
    aligned = [one for one in task.inputs if own and one[0] == _ALIGNED]
    base = [task.base] if task.base is not None else aligned
    others = [one for one in task.inputs if one not in aligned]
    return [*((_ALIGNED, one) for one in base), *zip(model_roles(len(others)), others, strict=True)]


def _edit_of(task: TensorTask, values: Mapping[str, object], roles: tuple[str, ...], seed: int) -> Any:
    line = find_method(task.method, room="repair")
    takes_seed = "seed" in {field.name for field in fields(line.load().config_class)}
    settings = {**({"seed": seed} if takes_seed else {}), **values}
    return build_edit(line, settings, models=sum(role != _ALIGNED for role in roles), roles=roles)


def _entry(task: TensorTask, entries: Mapping[str, Mapping[str, TensorEntry]], out_dtype: str | None) -> TensorEntry:
    """Return the output's entry: the recipe's dtype, else the one that holds the dtypes of all inputs."""
    import torch

    found = [entries[model][name] for model, name in (*((task.base,) if task.base else ()), *task.inputs)]
    if found[0].dtype not in FLOAT_DTYPES:
        return TensorEntry(task.output_name, found[0].dtype, found[0].shape)
    dtype = TORCH_DTYPES[found[0].dtype]
    for one in found[1:]:
        dtype = torch.promote_types(dtype, TORCH_DTYPES[one.dtype])
    return TensorEntry(task.output_name, out_dtype or STORED_NAMES[dtype], found[0].shape)


def _config_changes(
    recipe: Recipe, expansion: Expansion, opened: Mapping[str, TensorSource], output: Mapping[str, TensorEntry]
) -> dict[str, Any]:
    donor = opened[recipe.donor]
    config = donor.config_json() if isinstance(donor, Configured) else {}
    changes: dict[str, Any] = {}
    main = layout_of(donor.entries()).main
    is_changed = main is None or expansion.num_hidden_layers != main.layers
    if expansion.num_hidden_layers and is_changed and expansion.num_hidden_layers != config.get("num_hidden_layers"):
        if "num_hidden_layers" not in config:
            raise ConfigError(
                f"{recipe.where} changes the number of layers, and the model's config.json does not state it.",
                expected="num_hidden_layers at the top of config.json",
                found=f"{expansion.num_hidden_layers} layers for an architecture with parts",
                fix="keep the number of layers",
            )
        changes["num_hidden_layers"] = expansion.num_hidden_layers
        kinds = config.get("layer_types")
        if isinstance(kinds, list) and len(set(kinds)) == 1:
            changes["layer_types"] = [kinds[0]] * expansion.num_hidden_layers
        elif isinstance(kinds, list):
            raise ConfigError(
                f"{recipe.where} changes the number of layers of a model whose layers differ in kind.",
                expected="layers of one kind",
                found=", ".join(sorted(set(kinds))),
                fix="keep the number of layers",
            )
    if any(name in output for name in tied_tensors(config)):
        changes["tie_word_embeddings"] = False
    return changes


def _provenance(planned: Planned) -> Provenance:
    recipe = planned.recipe
    line = find_method(recipe.method, room="repair")
    return Provenance(
        method=recipe.method,
        title=line.title,
        citation=line.source,
        status=line.status,
        settings={"recipe": recipe.where, "plan": [f"{group}: {text}" for group, text in planned.rows()]},
        folders={key: local.folder for key, local in planned.models.items()},
        seed=recipe.seed,
    )
