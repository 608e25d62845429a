# SPDX-License-Identifier: Apache-2.0
"""From a suite's description to parts that can be asked: sets are read, items drawn, judges found."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from keelwright.core.config import require_choice
from keelwright.core.decoding import DecodingConfig
from keelwright.core.errors import ConfigError, DataError
from keelwright.core.protocols import Judge
from keelwright.core.records import Item
from keelwright.data.sets.catalogue import load_set
from keelwright.measure.limits import sample_items
from keelwright.measure.metric_table import find_metric
from keelwright.measure.part import Mitigation, Part, PartSpec, part_of_suite
from keelwright.measure.suites import find_suite, suite_digest
from keelwright.measure.suites.loading import SuiteSpec
from keelwright.measure.suites.own_sets import is_own, read_own_set

_BUILDERS: Final[Mapping[str, str]] = {
    "plain": "keelwright.measure.builders.plain:build",
    "user-specific": "keelwright.measure.builders.user_specific:build",
    "code-robustness": "keelwright.measure.builders.code_robustness:build",
    "continuations": "keelwright.measure.builders.continuations:build",
    "wrapped": "keelwright.measure.builders.wrapped:build",
}
BUILDERS: Final = ("suite", *_BUILDERS)


@dataclass(frozen=True, slots=True)
class Ordered:
    """What the user ordered beside the suite itself."""

    find_judge: Callable[[str], Judge]
    judges: tuple[str, ...] = ()
    """Judges beside those of the suite, or in place of one of the same name."""
    data: Path | None = None
    """Folder of data sets; None looks at KEELWRIGHT_DATA and the hub's cache."""
    hub: bool = False
    """Whether sets may be fetched from the hub."""
    limit: int | None = None
    """At most this many items of each kind and set."""
    seed: int = 0
    """Of the limit, of builders that draw, and of sampled answers."""
    max_new_tokens: int | None = None
    """In place of what the parts ask for."""
    batch_size: int = 32
    mitigation: Mitigation | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of sets and builders, over those of the parts."""


def build_parts(suite: SuiteSpec, ordered: Ordered) -> tuple[Part, ...]:
    """Return the parts of a suite, ready to be asked; no model is loaded.

    Raises:
        KeelwrightError: A set cannot be read, a judge is not known or needs what is not there, an item id is repeated,
            or a part has no items.
    """
    for spec in suite.parts:
        require_choice("builder", spec.builder, BUILDERS)
        for name in spec.metrics:
            find_metric(name)
    parts = tuple(
        _built_in(spec, ordered) if spec.builder == "suite" else _build(spec, ordered) for spec in suite.parts
    )
    _require_distinct([item for part in parts for item in part.items])
    return parts


def _built_in(spec: PartSpec, ordered: Ordered) -> Part:
    suite = find_suite(spec.sets[0])
    everything = suite.items()
    part = part_of_suite(
        suite,
        sample_items(everything, ordered.limit, seed=ordered.seed),
        suite_digest(everything),
        DecodingConfig(ordered.max_new_tokens or suite.max_new_tokens, ordered.batch_size),
    )
    extra = [ordered.find_judge(name) for name in ordered.judges]
    return replace(
        part,
        judges=(*part.judges, *extra),
        panel=(*part.panel, *ordered.judges),
        mitigation=ordered.mitigation,
    )


def _build(spec: PartSpec, ordered: Ordered) -> Part:
    settings = {**spec.settings, **ordered.settings}
    spec = replace(spec, settings=settings)

    def load(name: str) -> Any:
        if is_own(name):
            return read_own_set(name, dict(settings.get(name, {})))
        return load_set(name, data=ordered.data, offline=not ordered.hub, **dict(settings.get(name, {})))

    module, _, attribute = _BUILDERS[spec.builder].partition(":")
    drawn = getattr(importlib.import_module(module), attribute)(spec, load, limit=ordered.limit, seed=ordered.seed)
    if not drawn.items:
        raise DataError(
            f"The part '{spec.name}' has no items.",
            expected="at least one item",
            found=f"none out of {', '.join(spec.sets)}",
            fix="check its settings and --limit",
        )
    panel = judges_of(spec, ordered.judges)
    return Part(
        name=spec.name,
        says=spec.says,
        items=drawn.items,
        judges=tuple(ordered.find_judge(name) for name in panel),
        panel=panel,
        decoding=DecodingConfig(
            max_new_tokens=ordered.max_new_tokens or spec.max_new_tokens,
            batch_size=ordered.batch_size,
            temperature=spec.temperature,
            top_p=spec.top_p,
            seed=ordered.seed,
            samples=spec.samples,
            as_is=spec.builder == "continuations",
        ),
        metrics=spec.metrics,
        headline=spec.headline,
        knows_harm=spec.knows_harm,
        sets=drawn.sets,
        mitigation=ordered.mitigation,
    )


def judges_of(spec: PartSpec, ordered: Sequence[str]) -> tuple[str, ...]:
    """Return the judges of a part: its own, those ordered of the same name in their place, then the other ordered ones.

    A name that ends in a colon stands for a judge that must be ordered: `qi-rubric:` needs `--judge qi-rubric:MODEL`.

    Raises:
        ConfigError: A judge that must be ordered is not.
    """
    by_name = {one.partition(":")[0]: one for one in ordered}
    chosen: list[str] = []
    for own in spec.judges:
        name = own.partition(":")[0]
        if own.endswith(":") and name not in by_name:
            raise ConfigError(
                f"The suite '{spec.name}' needs the judge '{name}', which asks a model.",
                expected=f"--judge {name}:MODEL, where MODEL is a model reference or openai:NAME",
                found=f"judges {', '.join(ordered) or 'none'}",
                fix=f"add --judge {name}:MODEL",
            )
        chosen.append(by_name.get(name, own))
    return tuple(dict.fromkeys([*chosen, *ordered]))


def _require_distinct(items: Sequence[Item]) -> None:
    seen: set[str] = set()
    for item in items:
        if item.item_id in seen:
            raise DataError(
                f"Two items of the suite have the id '{item.item_id}'.",
                expected="a different id for every item",
                found=f"'{item.item_id}' twice",
                fix="name each set once",
            )
        seen.add(item.item_id)
