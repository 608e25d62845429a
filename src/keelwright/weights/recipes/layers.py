# SPDX-License-Identifier: Apache-2.0
"""Which tensor belongs to which layer, read off the names alone: no table per architecture.

A stack is a numbered run of modules, `PREFIX.0.`, `PREFIX.1.`, ... without holes. The main stack is the text decoder:
among the stacks outside anything that names pictures or sound, the one with most elements, and then with most tensors.
The remaining tensors come before the layers (embeddings) or after them (final norm, head), told apart by their names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from keelwright.core.protocols import TensorEntry

NUMBERED: Final = re.compile(r"(?:(?P<prefix>.+?)\.)?(?P<index>\d+)\.(?P<suffix>.+)", re.ASCII)
_SENSES: Final = ("vision", "visual", "vit", "image", "pixel", "audio", "speech", "sound", "video")
_HEADS: Final = ("lm_head", "embed_out", "head", "score", "classifier", "output", "out_head", "project_out")


@dataclass(frozen=True, slots=True)
class Stack:
    """A numbered run of layers."""

    prefix: str
    """What stands before the number, for example `model.layers`."""
    layers: int
    elements: int
    tensors: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands in its model, in words that do not depend on how the model names its text stack."""

    stack: str | None
    """None: outside every stack. Empty: the main stack. Else the prefix of another one."""
    layer: int
    """0 outside a stack."""
    rest: str
    """The name behind the layer's number; outside a stack the name, the text stack's own prefix written as `@.`."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The stacks of a model and the place of each of its tensors."""

    main: Stack | None
    others: tuple[Stack, ...]
    root: str
    """Prefix of the text stack's modules, for example `model` or `model.language_model`; empty where there is none."""
    places: Mapping[Place, str]
    """Tensor name by place."""

    def layers(self, stack: str) -> int:
        """Return the number of layers of a stack, 0 where the model has no such stack."""
        if stack == "":
            return 0 if self.main is None else self.main.layers
        return next((one.layers for one in self.others if one.prefix == stack), 0)

    def name_of(self, place: Place) -> str:
        """Return the name that a tensor at a place has, or would have, in this model."""
        if place.stack is None:
            return f"{self.root}.{place.rest[2:]}" if place.rest.startswith("@.") and self.root else place.rest
        prefix = (self.main.prefix if self.main else "") if place.stack == "" else place.stack
        return f"{prefix}.{place.layer}.{place.rest}" if prefix else f"{place.layer}.{place.rest}"


def layout_of(entries: Mapping[str, TensorEntry]) -> Layout:
    """Return the stacks and places of a model's tensors.

    Args:
        entries: Its tensors by name, as `TensorSource.entries` gives them.
    """
    numbered = {name: match for name in sorted(entries) if (match := NUMBERED.fullmatch(name))}
    members: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, match in numbered.items():
        members[match["prefix"] or ""][int(match["index"])].append(name)
    stacks = [
        Stack(
            prefix,
            len(layers),
            sum(entries[name].elements for names in layers.values() for name in names),
            sum(len(names) for names in layers.values()),
        )
        for prefix, layers in members.items()
        if sorted(layers) == list(range(len(layers)))
    ]
    main = _main_stack(stacks)
    others = tuple(sorted((one for one in stacks if one is not main), key=lambda one: one.prefix))
    root = main.prefix.rpartition(".")[0] if main else ""
    prefixes = {one.prefix for one in stacks}
    places: dict[Place, str] = {}
    for name in sorted(entries):
        found = numbered.get(name)
        if found is not None and (found["prefix"] or "") in prefixes:
            prefix = found["prefix"] or ""
            stack = "" if main is not None and prefix == main.prefix else prefix
            places[Place(stack, int(found["index"]), found["suffix"])] = name
        else:
            rest = f"@.{name.removeprefix(root + '.')}" if root and name.startswith(f"{root}.") else name
            places[Place(None, 0, rest)] = name
    return Layout(main, others, root, places)


def _main_stack(stacks: list[Stack]) -> Stack | None:
    texts = [one for one in stacks if not names_a_sense(one.prefix)] or stacks
    return max(texts, key=lambda one: (one.elements, one.tensors, one.prefix), default=None)


def names_a_sense(name: str) -> bool:
    """Return whether a name is that of a part for pictures or sound."""
    return any(part.startswith(sense) for part in re.split(r"[._]", name.lower()) for sense in _SENSES)


def comes_after_layers(name: str) -> bool:
    """Return whether a tensor outside the layers belongs behind them: a final norm or a head.

    >>> comes_after_layers("model.norm.weight"), comes_after_layers("transformer.word_embeddings_layernorm.weight")
    (True, False)
    """
    parts = name.lower().split(".")[:-1] or [name.lower()]
    if any(part in _HEADS for part in parts):
        return True
    if any("emb" in part or part in ("wte", "wpe") for part in parts):
        return False
    return any("norm" in part or part.startswith(("ln", "final")) for part in parts)


def belongs_to(name: str, place: Place, module: str) -> bool:
    """Return whether a tensor is part of the module that a recipe names.

    The text stack goes by `text_decoder`, `language_model`, `text_model` or `decoder`, and takes the main stack, what
    stands beside it under the same prefix, and the head. Any other module is a component of the tensors' names.

    Args:
        name: The tensor.
        place: Its place.
        module: The recipe's name for the module.
    """
    if module in TEXT_MODULES:
        if place.stack is not None:
            return place.stack == ""
        beside = place.rest.startswith("@.") or name.split(".", maxsplit=1)[0] in _HEADS
        return beside and not names_a_sense(name) and not _PROJECTOR.search(name)
    return module in name.split(".")


TEXT_MODULES: Final = ("text_decoder", "language_model", "text_model", "decoder")
_PROJECTOR: Final = re.compile(
    r"(^|\.)(multi_modal_projector|mm_projector|connector|projector|resampler|aligner)(\.|$)"
)
