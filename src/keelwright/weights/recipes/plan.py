# SPDX-License-Identifier: Apache-2.0
"""A recipe and the headers of its models, expanded to one task per output tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from keelwright.core.errors import ConfigError, ModelMismatchError
from keelwright.core.protocols import TensorEntry
from keelwright.weights.recipes.layers import Layout, Place, belongs_to, comes_after_layers, layout_of
from keelwright.weights.recipes.mergekit import missing_parameter
from keelwright.weights.recipes.recipe import Level, Module, Recipe, Slice, Source, TensorTask
from keelwright.weights.recipes.settings import METHODS, PARITY, MethodSettings, Parameter, check_value
from keelwright.weights.recipes.values import OUTSIDE, Position, Scalar, first_value


@dataclass(frozen=True, slots=True)
class Expansion:
    """What a recipe comes to on given models."""

    tasks: tuple[TensorTask, ...]
    """One per output tensor: embeddings, layers in order, norm and head, part by part."""
    num_hidden_layers: int
    """Layers of the text stack in the output, for its `config.json`."""
    layers: Mapping[str, int] = field(default_factory=dict)
    """Layers of every stack in the output, by what stands before the number in its names."""
    unwritten: tuple[str, ...] = ()
    """Tensors that no model stores because each ties them to another."""
    warnings: tuple[str, ...] = ()
    """Rules that fit no tensor of these models."""


@dataclass(frozen=True, slots=True)
class _Models:
    layouts: Mapping[str, Layout]
    entries: Mapping[str, Mapping[str, TensorEntry]]
    tied: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def find(self, model: str, place: Place) -> str | None:
        """Return the tensor of a model at a place, or the one that it is tied to, or None."""
        layout = self.layouts[model]
        name = layout.places.get(place)
        if name is not None:
            return name
        tied = self.tied.get(model, {}).get(layout.name_of(place))
        return tied if tied in self.entries[model] else None


@dataclass(frozen=True, slots=True)
class _Spot:
    """One output tensor: its place in each source, its depth, and the slice that says how it is made."""

    output: str
    places: tuple[Place, ...]
    position: Position
    slice: Slice
    module: Module


def expand(
    recipe: Recipe,
    entries: Mapping[str, Mapping[str, TensorEntry]],
    *,
    tied: Mapping[str, Mapping[str, str]] | None = None,
) -> Expansion:
    """Return the tasks of a recipe. Headers only: no tensor is read.

    Args:
        recipe: The recipe.
        entries: The tensors of each model, by the keys of `Recipe.models`.
        tied: For each model, the tensors that it does not store with the ones that they are tied to, as
            `models.names.tied_tensors` gives them. They are read in place of the missing ones where another model
            stores its own.

    Returns:
        Tasks in the order of the output's layers. The order of the mappings does not matter.

    Raises:
        ConfigError: A layer range leaves its model, a part is not there, a required setting fits a tensor nowhere, or
            a value is wrong.
        ModelMismatchError: The models have different numbers of layers or different tensors.
    """
    used = {source.model for module in recipe.modules for one in module.slices for source in one.sources}
    layouts = {key: layout_of(entries[key]) for key in sorted(used | {recipe.donor})}
    models = _Models(layouts, entries, tied or {})
    tasks: list[TensorTask] = []
    claimed: set[Place] = set()
    for module in recipe.modules:
        part = module if recipe.scope is None else replace(module, name=recipe.scope)
        found = [_task(recipe, models, spot) for spot in _spots(recipe, models, part, claimed)]
        if not found:
            raise _no_such_part(recipe, models, part)
        tasks.extend(found)
    if recipe.scope is None:
        _require_all_claimed(recipe, models, claimed)
    else:
        tasks.extend(_outside(recipe, layouts[recipe.donor], claimed))
    _require_one_task_each(recipe, tasks)
    layers = _count_layers(tasks)
    main = layouts[recipe.donor].main
    return Expansion(
        tuple(tasks), layers.get(main.prefix, 0) if main else 0, layers, _unwritten(models), _idle_rules(recipe, tasks)
    )


def _idle_rules(recipe: Recipe, tasks: Sequence[TensorTask]) -> tuple[str, ...]:
    names = {name for task in tasks for name in (task.output_name, *(name for _, name in task.inputs))}
    slices = [(module, one) for module in recipe.modules for one in module.slices]
    levels: list[Level] = [recipe.settings, *(module.settings for module in recipe.modules)]
    levels += [one.settings for _, one in slices]
    levels += [source.settings for _, one in slices for source in one.sources]
    found: list[str] = []
    for setting_name, setting in ((key, level[key]) for level in levels for key in level):
        for rule in setting.rules:
            if not any(setting.fits(rule.filter, name) for name in names):
                hint = "" if setting.globs else ": a filter is a part of the name, compared as plain text"
                found.append(f"{recipe.where}: the filter '{rule.filter}' of '{setting_name}' fits no tensor{hint}.")
    return tuple(dict.fromkeys(found))


def _outside(recipe: Recipe, donor: Layout, claimed: set[Place]) -> list[TensorTask]:
    """Return copies of the donor's tensors outside the part that the recipe merges."""
    names = sorted(name for place, name in donor.places.items() if place not in claimed)
    note = f"outside '{recipe.scope}'"
    return [TensorTask(name, "passthrough", ((recipe.donor, name),), None, {}, ({},), note) for name in names]


def _count_layers(tasks: Sequence[TensorTask]) -> dict[str, int]:
    entries = {task.output_name: TensorEntry(task.output_name, "F32", ()) for task in tasks}
    layout = layout_of(entries)
    return {one.prefix: one.layers for one in (*((layout.main,) if layout.main else ()), *layout.others)}


def _spots(recipe: Recipe, models: _Models, module: Module, claimed: set[Place]) -> list[_Spot]:
    """Return the output tensors of a module; note the places of its inputs as claimed."""
    out = models.layouts[recipe.donor]
    places = _places_of(models, module)
    claimed |= places
    first, last = module.slices[0], module.slices[-1]
    outer = sorted((place for place in places if place.stack is None), key=lambda place: place.rest)
    before: list[_Spot] = []
    after: list[_Spot] = []
    for place in outer:
        behind = comes_after_layers(place.rest)
        chosen = last if behind else first
        spot = _Spot(out.name_of(place), (place,) * len(chosen.sources), OUTSIDE, chosen, module)
        (after if behind else before).append(spot)
    inner: list[_Spot] = []
    for stack in sorted({place.stack for place in places if place.stack is not None}):
        inner.extend(_stack_spots(recipe, models, module, stack, places))
    return [*before, *inner, *after]


def _places_of(models: _Models, module: Module) -> set[Place]:
    """Return the places of the module's tensors in any of its models."""
    keys = {source.model for one in module.slices for source in one.sources}
    return {
        place
        for key in keys
        for place, name in models.layouts[key].places.items()
        if module.name is None or belongs_to(name, place, module.name)
    }


def _stack_spots(recipe: Recipe, models: _Models, module: Module, stack: str, places: set[Place]) -> list[_Spot]:
    out = models.layouts[recipe.donor]
    stacks = {place.stack for place in places if place.stack is not None}
    cut = any(source.layers is not None for one in module.slices for source in one.sources)
    if cut and len(stacks) > 1:
        raise ConfigError(
            f"{recipe.where}: 'slices' cut layers, and the models have several runs of them.",
            expected="models with one run of layers, or 'modules' that name the parts",
            found=", ".join(sorted(one or "the text stack" for one in stacks)),
            fix="put the slices under 'modules: {text_decoder: ...}' and list the other parts beside it",
        )
    inside: dict[tuple[str, int], set[str]] = {}
    for key in {source.model for one in module.slices for source in one.sources}:
        for place in models.layouts[key].places:
            if place.stack == stack:
                inside.setdefault((key, place.layer), set()).add(place.rest)
    spots: list[_Spot] = []
    number = 0
    for one in module.slices:
        ranges = [_range(recipe, models, source, stack) for source in one.sources]
        length = ranges[0][1] - ranges[0][0]
        if any(stop - start != length for start, stop in ranges):
            raise _different_depths(models, one, stack)
        for index in range(length):
            layers = [start + index for start, _ in ranges]
            rests: set[str] = set()
            for source, layer in zip(one.sources, layers, strict=True):
                rests |= inside.get((source.model, layer), set())
            for rest in sorted(rests):
                output = out.name_of(Place(stack, number, rest))
                inputs = tuple(Place(stack, layer, rest) for layer in layers)
                spots.append(_Spot(output, inputs, Position(index, length), one, module))
            number += 1
    return spots


def _range(recipe: Recipe, models: _Models, source: Source, stack: str) -> tuple[int, int]:
    layers = models.layouts[source.model].layers(stack)
    if source.layers is None:
        return 0, layers
    if source.layers[1] > layers:
        raise ConfigError(
            f"{recipe.where}: a layer range leaves its model.",
            expected=f"layers of '{source.model}' in [0, {layers}]",
            found=f"[{source.layers[0]}, {source.layers[1]}]",
            fix="the second number is one after the last layer; lower it",
        )
    return source.layers


def _task(recipe: Recipe, models: _Models, spot: _Spot) -> TensorTask:
    """Return the task of one output tensor, with every setting resolved."""
    pairs = list(zip(spot.slice.sources, spot.places, strict=True))
    named = [(source, models.find(source.model, place)) for source, place in pairs]
    present = [(source, name) for source, name in named if name is not None]
    if len(present) < len(named):
        return _partial_task(recipe, spot, present)
    base = next(((source.model, name) for source, name in present if source.model == spot.slice.base), None)
    others = [(source, name) for source, name in present if source.model != spot.slice.base]
    shared = _shared(recipe, spot)
    apiece = tuple(_apiece(recipe, spot, source, name) for source, name in others)
    _require_apiece(recipe, spot, others, apiece)
    _check_weights(recipe, spot, shared, apiece)
    inputs = tuple((source.model, name) for source, name in others)
    if not inputs and base is not None:
        return TensorTask(spot.output, "passthrough", (base,), None, {}, ({},), "no model besides the base")
    return TensorTask(spot.output, recipe.method, inputs, base, shared, apiece)


def _partial_task(recipe: Recipe, spot: _Spot, present: list[tuple[Source, str]]) -> TensorTask:
    """Return the copy of a tensor that one model alone has, where the method allows it."""
    alone = recipe.table.alone
    if len(present) == 1:
        source, name = present[0]
        if alone == "copy" or (alone == "base" and source.model == spot.slice.base):
            note = f"only '{source.model}' has it"
            return TensorTask(spot.output, "passthrough", ((source.model, name),), None, {}, ({},), note)
    holders = {source.model for source, _ in present}
    lacking = [source.model for source in spot.slice.sources if source.model not in holders]
    raise ModelMismatchError(
        f"{recipe.where}: '{spot.output}' is not in all of the models that make it.",
        expected=f"that tensor in {', '.join(source.model for source in spot.slice.sources)}",
        found=f"none in {', '.join(lacking)}",
        fix=f"merge models with the same tensors; '{recipe.method}' cannot do without it",
    )


def _shared(recipe: Recipe, spot: _Spot) -> dict[str, Scalar]:
    levels = (spot.slice.settings, spot.module.settings, recipe.settings)
    values: dict[str, Scalar] = {}
    for parameter in recipe.table.shared:
        value = _resolve(recipe, levels, parameter, spot.output, spot.position, spot.slice.sources[0].model)
        if value is not None:
            values[parameter.field] = value
    if recipe.format == "mergekit":
        values.update(PARITY.get(recipe.method, {}))
    return values


def _apiece(recipe: Recipe, spot: _Spot, source: Source, name: str) -> dict[str, Scalar]:
    levels = (source.settings, spot.slice.settings, spot.module.settings, recipe.settings)
    values: dict[str, Scalar] = {}
    for parameter in recipe.table.per_model:
        value = _resolve(recipe, levels, parameter, name, spot.position, source.model)
        if value is not None:
            values[parameter.field] = value
    return values


def _resolve(
    recipe: Recipe, levels: tuple[Level, ...], parameter: Parameter, tensor: str, position: Position, model: str
) -> Scalar | None:
    value = first_value(levels, parameter.name, tensor, position)
    if value is None:
        value = parameter.default
    if value is None:
        if parameter.required:
            raise missing_parameter(recipe.where, recipe.table, parameter.name, model, tensor)
        return None
    return check_value(f"{recipe.where}: '{recipe.method}' at '{tensor}'", parameter, value)


def _require_apiece(
    recipe: Recipe, spot: _Spot, others: list[tuple[Source, str]], apiece: tuple[Mapping[str, Scalar], ...]
) -> None:
    """Raise where a setting is given for some of the models and not for the others: there is no default to mix in."""
    for name in sorted({name for one in apiece for name in one}):
        lacking = [source.model for (source, _), one in zip(others, apiece, strict=True) if name not in one]
        if lacking:
            raise ConfigError(
                f"{recipe.where}: '{name}' is given for some of the models at '{spot.output}', not for all.",
                expected=f"'{name}' for every model, or for none",
                found=f"nothing for {', '.join(lacking)}",
                fix=f"add '{name}' for all models, or '{name}.{lacking[0]}'",
            )


def _check_weights(
    recipe: Recipe, spot: _Spot, shared: Mapping[str, Scalar], apiece: tuple[Mapping[str, Scalar], ...]
) -> None:
    weights = [float(value) for one in apiece for name, value in one.items() if name == "weight"]
    table: MethodSettings = recipe.table
    # Our recipes leave what they do not name to the config, whose defaults of these two are the table's.
    normalized = {one.name: one.default for one in METHODS[table.name].shared} if table.name in METHODS else {}
    divides = any(shared.get(name, normalized.get(name)) is True for name in ("normalize", "normalize_weights"))
    if not weights or not divides:
        return
    where = f"{recipe.where}: '{recipe.method}' at '{spot.output}'"
    spelt = ", ".join(f"{weight:g}" for weight in weights)
    if table.normalizes and min(weights) < 0.0:
        raise ConfigError(
            f"{where}: a negative weight under 'normalize'.",
            expected="weights of 0 or more: dividing by a negative weight adds what it should subtract",
            found=spelt,
            fix="write 'normalize: false', or keep the weights positive and set the strength with "
            f"'{'lambda' if recipe.format == 'mergekit' else 'coefficient'}'",
        )
    if not table.normalizes and sum(weights) == 0.0:
        raise ConfigError(
            f"{where}: the weights sum to 0, and cannot be normalised.",
            expected="weights whose sum is not 0",
            found=spelt,
            fix="change a weight, or switch the normalisation off",
        )


def _no_such_part(recipe: Recipe, models: _Models, module: Module) -> ConfigError:
    parts = sorted(
        {part for name in models.entries[recipe.donor] for part in name.split(".")[:-1] if not part.isdigit()}
    )
    shown = ", ".join(parts[:20])
    return ConfigError(
        f"{recipe.where}: the models have no part '{module.name}'.",
        expected=f"text_decoder, or a component of the tensors' names: {shown}",
        found=str(module.name),
        fix="name a part as the checkpoint does",
    )


def _require_all_claimed(recipe: Recipe, models: _Models, claimed: set[Place]) -> None:
    left = sorted(name for place, name in models.layouts[recipe.donor].places.items() if place not in claimed)
    if left:
        raise ConfigError(
            f"{recipe.where}: no module of the recipe covers {len(left)} of the tensors.",
            expected="modules that together name every part of the model",
            found=", ".join(left[:5]) + (", ..." if len(left) > 5 else ""),
            fix="add their part under 'modules'",
        )


def _require_one_task_each(recipe: Recipe, tasks: list[TensorTask]) -> None:
    seen: set[str] = set()
    for task in tasks:
        if task.output_name in seen:
            raise ConfigError(
                f"{recipe.where}: two modules of the recipe make '{task.output_name}'.",
                expected="modules that share no tensor",
                found=", ".join(str(module.name) for module in recipe.modules),
                fix="name parts that do not lie inside each other",
            )
        seen.add(task.output_name)


def _different_depths(models: _Models, one: Slice, stack: str) -> ModelMismatchError:
    counts = ", ".join(f"{models.layouts[source.model].layers(stack)} in '{source.model}'" for source in one.sources)
    return ModelMismatchError(
        "The models do not have the same number of layers.",
        expected=f"equally many layers in {stack or 'the text stack'}",
        found=counts,
        fix="choose layers of each with 'slices'",
    )


def _unwritten(models: _Models) -> tuple[str, ...]:
    names: Iterator[str] = (
        name for key, pairs in models.tied.items() for name in pairs if name not in models.entries.get(key, {})
    )
    stored = {name for entries in models.entries.values() for name in entries}
    return tuple(sorted(set(names) - stored))
