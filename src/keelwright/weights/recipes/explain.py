# SPDX-License-Identifier: Apache-2.0
"""The plan of a recipe for a person: one row per group of tensors that are treated alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from keelwright.weights.recipes.layers import NUMBERED
from keelwright.weights.recipes.plan import Expansion
from keelwright.weights.recipes.recipe import Recipe, TensorTask


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What happens to a group of tensors."""

    tensors: str
    """The group, for example `model.layers.{0-3,7}.mlp.*`."""
    count: int
    method: str
    inputs: str
    """Where the values come from; a layer that moves is shown as an offset."""
    settings: str
    action: str
    """`copy` or `computed`."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Alike:
    """What two tasks must share to stand in one row, and how it is printed."""

    method: str
    inputs: str
    settings: str
    action: str
    note: str


def explain(recipe: Recipe, tasks: Sequence[TensorTask]) -> list[PlanRow]:
    """Return the plan, in the order of the output.

    Args:
        recipe: The recipe.
        tasks: Its tasks, as `expand` gives them.
    """
    groups: dict[tuple[str, _Alike], list[tuple[int | None, int]]] = {}
    for prefix, layer, members in _blocks(tasks):
        for pattern, alike, count in _collapse(members):
            name = f"{prefix}{{}}.{pattern}" if layer is not None else pattern
            groups.setdefault((name, alike), []).append((layer, count))
    rows = []
    for (pattern, alike), found in groups.items():
        layers = [layer for layer, _ in found if layer is not None]
        name = pattern.replace("{}", _ranges(layers), 1) if layers else pattern
        count = sum(one for _, one in found)
        rows.append(PlanRow(name, count, alike.method, alike.inputs, alike.settings, alike.action, alike.note))
    return rows


def describe(recipe: Recipe, expansion: Expansion) -> list[tuple[str, str]]:
    """Return what a screen shows before the work: the head of the plan, its rows, warnings and notes.

    Args:
        recipe: The recipe.
        expansion: What `expand` made of it.
    """
    lines = [("method", f"{recipe.method} ({recipe.format} recipe)")]
    lines += [(f"model {key}" if key != text else "model", text) for key, text in recipe.models.items()]
    lines.append(("config, tokenizer from", recipe.donor))
    lines.append(("output dtype", recipe.out_dtype or "as the inputs"))
    if recipe.tokenizer_source is not None:
        lines.append(("vocabulary", recipe.tokenizer_source))
    for row in explain(recipe, expansion.tasks):
        words = [f"{row.method} of {row.inputs}", row.settings, row.note]
        lines.append((row.tensors, f"{row.action}, {row.count}: " + "; ".join(one for one in words if one)))
    lines += [("warning", one) for one in (*recipe.warnings, *expansion.warnings)]
    lines += [("note", one) for one in recipe.notes]
    return lines


def _blocks(tasks: Sequence[TensorTask]) -> Iterable[tuple[str, int | None, list[tuple[str, _Alike]]]]:
    """Yield layers with their tensors' names behind the number, and each other tensor on its own."""
    blocks: dict[tuple[str, int | None], list[tuple[str, _Alike]]] = {}
    for task in tasks:
        match = NUMBERED.fullmatch(task.output_name)
        if match is None:
            blocks[(task.output_name, None)] = [(task.output_name, _alike(task, None))]
        else:
            prefix = f"{match['prefix']}." if match["prefix"] else ""
            alike = _alike(task, int(match["index"]))
            blocks.setdefault((prefix, int(match["index"])), []).append((match["suffix"], alike))
    for (prefix, layer), members in blocks.items():
        yield prefix, layer, members


def _collapse(members: list[tuple[str, _Alike]]) -> list[tuple[str, _Alike, int]]:
    """Return the fewest patterns for the tensors of a layer: all of it, its modules, or single tensors."""
    if len(members) == 1:
        return [(members[0][0], members[0][1], 1)]
    if len({alike for _, alike in members}) == 1:
        return [("*", members[0][1], len(members))]
    modules: dict[str, list[tuple[str, _Alike]]] = defaultdict(list)
    for name, alike in members:
        modules[name.partition(".")[0]].append((name, alike))
    found = []
    for module, inside in modules.items():
        if len(inside) > 1 and len({alike for _, alike in inside}) == 1:
            found.append((f"{module}.*", inside[0][1], len(inside)))
        else:
            found.extend((name, alike, 1) for name, alike in inside)
    return found


def _alike(task: TensorTask, layer: int | None) -> _Alike:
    sources = [*((task.base,) if task.base is not None else ()), *task.inputs]
    inputs = ", ".join(
        f"{model}{_offset(name, layer)}{' (base)' if (model, name) == task.base else ''}" for model, name in sources
    )
    columns = dict.fromkeys(name for one in task.per_model for name in one)
    apiece = [f"{name} {', '.join(_spell(one.get(name)) for one in task.per_model)}" for name in columns]
    shared = [f"{name} {_spell(value)}" for name, value in task.settings.items()]
    action = "copy" if task.is_copy() else "computed"
    return _Alike(task.method, inputs, "; ".join([*apiece, *shared]), action, task.note)


def _offset(name: str, layer: int | None) -> str:
    match = NUMBERED.fullmatch(name)
    moved = 0 if match is None or layer is None else int(match["index"]) - layer
    return f" (layer {moved:+d})" if moved else ""


def _spell(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else "default" if value is None else str(value)


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as ranges.

    >>> _ranges([0, 1, 2, 3, 7])
    '{0-3,7}'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in runs]
    return texts[0] if len(texts) == 1 and "-" not in texts[0] else "{" + ",".join(texts) + "}"
