# SPDX-License-Identifier: Apache-2.0
"""What every builder does with sets: read them by name, and say what was drawn from each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from keelwright.core.config import C, config_from_mapping
from keelwright.core.digests import json_digest
from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Item
from keelwright.data.sets.catalogue import SETS
from keelwright.measure.part import PartSpec, SetFacts


class Loaded(Protocol):
    """A set that was read; `data.sets.spec.LoadedSet` is one."""

    @property
    def name(self) -> str: ...
    @property
    def items(self) -> Sequence[Item]: ...
    @property
    def digest(self) -> str: ...
    @property
    def licence(self) -> str: ...
    @property
    def caution(self) -> str: ...


Load = Callable[[str], Loaded]


def read_sets(spec: PartSpec, load: Load) -> list[Loaded]:
    """Return the part's sets, in order.

    Raises:
        DataError: A set has nothing that can be asked.
    """
    sets = [load(name) for name in spec.sets]
    for name, loaded in zip(spec.sets, sets, strict=True):
        if not loaded.items:
            raise DataError(
                f"The set '{name}' has nothing to ask.",
                expected="at least one request",
                found="labelled texts or pairs alone",
                fix="name a set of requests",
            )
    return sets


def facts_of(sets: Sequence[Loaded], items: Sequence[Item], *, wording: object = None) -> tuple[SetFacts, ...]:
    """Return what a report says of each set.

    Args:
        sets: What was read.
        items: What is asked.
        wording: What the builder adds to prompts; part of the digest, so that other words are another set.
    """
    found = []
    for loaded in sets:
        digest = loaded.digest if wording is None else json_digest([loaded.digest, wording])
        asked = sum(item.suite == loaded.name for item in items)
        title = SETS[loaded.name].title if loaded.name in SETS else loaded.name
        found.append(SetFacts(loaded.name, title, loaded.licence, digest, asked, loaded.caution))
    return tuple(found)


def settings_of(spec: PartSpec, kind: type[C]) -> C:
    """Return the builder's settings: those that the part gives under the builder's name, over the defaults.

    Raises:
        ConfigError: They are no mapping, or one of them is unknown or wrong.
    """
    values: Any = spec.settings.get(spec.builder, {})
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"The settings of the builder '{spec.builder}' are no mapping.",
            expected=f"settings: {{{spec.builder}: {{NAME: VALUE}}}}",
            found=repr(values),
            fix="write them as a mapping",
        )
    return config_from_mapping(kind, values, where=f"settings of '{spec.builder}' in '{spec.name}'")
