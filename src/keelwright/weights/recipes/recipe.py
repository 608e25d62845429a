# SPDX-License-Identifier: Apache-2.0
"""What a recipe says, in one form for both formats, and what it comes to for each output tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from keelwright.weights.recipes.settings import MethodSettings
from keelwright.weights.recipes.values import Scalar, Setting

Level = Mapping[str, Setting]
"""Settings of one level of a recipe, by name."""


@dataclass(frozen=True, slots=True)
class Source:
    """One model in one slice."""

    model: str
    """Key of the model in `Recipe.models`."""
    layers: tuple[int, int] | None = None
    """First layer and the one after the last; None: all of them."""
    settings: Level = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of output layers and the layers that they are made of."""

    sources: tuple[Source, ...]
    base: str | None = None
    """Key of the model that task vectors start from; None where the method has none."""
    settings: Level = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Module:
    """A part of a model (text stack, vision tower) and the slices that make it; unnamed: the whole model."""

    name: str | None
    slices: tuple[Slice, ...]
    settings: Level = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe, checked; no model has been opened yet."""

    format: Literal["own", "mergekit"]
    where: str
    """The file, for error texts."""
    method: str
    table: MethodSettings
    """The method's settings under the names of this format."""
    models: Mapping[str, str]
    """References as `models.refs.parse_ref` reads them, by key: mergekit's files use the reference itself, ours the
    role (`aligned`, `tuned`, `tuned_2`, ...)."""
    base: str | None
    """Key of the base; None: the method has none, or the slices name it."""
    modules: tuple[Module, ...]
    settings: Level = field(default_factory=dict)
    """Settings at the top."""
    out_dtype: str | None = None
    """safetensors name; None: the promoted dtype of the inputs."""
    tokenizer_source: str | None = None
    """`base`, `union` or a model's key; None: all vocabularies must agree."""
    pad_to_multiple_of: int | None = None
    seed: int = 0
    scope: str | None = None
    """The part that is merged (`language_model`); the rest is copied from the donor. None: all of it."""
    warnings: tuple[str, ...] = ()
    """What the file says that has no effect."""
    notes: tuple[str, ...] = ()
    """What a reader of the plan should know: where semantics follow the other program."""

    @property
    def donor(self) -> str:
        """Key of the model whose config, tokenizer and tensor names the output takes."""
        if self.format == "own" and "tuned" in self.models:
            return "tuned"
        return next(iter(self.models)) if self.base is None else self.base


@dataclass(frozen=True, slots=True)
class TensorTask:
    """What is to be done for one output tensor; every setting is a plain value."""

    output_name: str
    method: str
    inputs: tuple[tuple[str, str], ...]
    """Model key and tensor name of every model besides the base, in the recipe's order."""
    base: tuple[str, str] | None
    settings: Mapping[str, Scalar]
    """Shared settings, by config field."""
    per_model: tuple[Mapping[str, Scalar], ...]
    """Settings of each input, by config field."""
    note: str = ""
    """Why it is treated apart, where it is: for example that only one model has it."""

    def config_values(self) -> dict[str, object]:
        """Return the fields of the method's config: shared ones, and one tuple per setting that models have apiece.

        A method that takes exactly one model gets plain values instead of tuples.
        """
        values: dict[str, object] = dict(self.settings)
        for name in self.per_model[0] if self.per_model else ():
            column = tuple(one[name] for one in self.per_model if name in one)
            values[name] = column[0] if self.method == "passthrough" else column
        return values

    def is_copy(self) -> bool:
        """Return whether the bytes of the one input move unchanged."""
        return self.method == "passthrough" and self.config_values().get("scale") in (None, 1.0)
