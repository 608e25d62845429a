# SPDX-License-Identifier: Apache-2.0
"""The data sets that keelwright reads by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keelwright.core.config import nearest
from keelwright.core.digests import file_digest, json_digest
from keelwright.core.errors import ConfigError, DataError
from keelwright.data.sets.finding import find_files
from keelwright.data.sets.published import PUBLISHED
from keelwright.data.sets.spec import Contents, LoadedSet, SetSpec

SETS: Mapping[str, SetSpec] = {spec.name: spec for spec in PUBLISHED}
"""Every set, by name."""


def find_set(name: str) -> SetSpec:
    """Return what is known of a set before it is read.

    Raises:
        ConfigError: There is no such set; the nearest name is offered.
    """
    if name not in SETS:
        raise ConfigError(
            f"There is no data set '{name}'.",
            expected=f"one of {', '.join(SETS)}",
            found=name,
            fix=nearest(name, SETS),
        )
    return SETS[name]


def load_set(name: str, *, data: Path | str | None = None, offline: bool = False, **options: Any) -> LoadedSet:
    """Read a published data set.

    Args:
        name: One of `SETS`.
        data: A file, a folder with the set's files, or a folder with one folder per set; None looks at the folder of
            `KEELWRIGHT_DATA`, and then at the hub where the set is published there.
        offline: Take from the hub only what an earlier download left in its cache.
        options: Settings of the set's loader, such as `functional` of `harmbench`.

    Raises:
        ConfigError: There is no such set, or no such option.
        MissingError: Its files were not found.
        DataError: A file is malformed, or the options leave nothing.
    """
    spec = find_set(name)
    load = _loader(spec)
    settings = _settings(spec, load, options)
    files = find_files(spec, data=None if data is None else Path(data), offline=offline)
    contents: Contents = load(files, **settings)
    if not (contents.items or contents.answers or contents.texts or contents.pairs):
        raise DataError(
            f"Nothing is left of the data set '{name}'.",
            expected="at least one row",
            found="; ".join(f"{count}: {reason}" for reason, count in contents.left_out.items()) or "no rows",
            fix="choose other options",
        )
    paths = tuple(path for part in spec.files for path in files.get(part.role, ()))
    return LoadedSet(
        name=name,
        items=contents.items,
        answers=contents.answers,
        texts=contents.texts,
        pairs=contents.pairs,
        left_out=contents.left_out,
        digest=_digest(paths, load, settings),
        licence=spec.licence,
        caution=spec.caution,
        paths=paths,
    )


def _digest(paths: Sequence[Path], load: Any, settings: Mapping[str, Any]) -> str:
    """Return the digest of the files, and of the options that are not the loader's own: they may change prompts."""
    files: list[Any] = [file_digest(path) for path in paths]
    chosen = {name: value for name, value in settings.items() if value != _defaults(load)[name]}
    return json_digest([*files, chosen] if chosen else files)


def _defaults(load: Any) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(load).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def _loader(spec: SetSpec) -> Any:
    module, _, attribute = spec.loader.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _settings(spec: SetSpec, load: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options as the loader takes them; one name stands for a list of one."""
    known = _defaults(load)
    settings = {}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(
                f"The data set '{spec.name}' has no option '{name}'.",
                expected=f"one of {', '.join(known)}" if known else "no options",
                found=name,
                fix=nearest(name, known) if known else "leave it out",
            )
        settings[name] = _names(spec, name, value) if isinstance(known[name], tuple) else value
    return settings


def _names(spec: SetSpec, name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence) or not value or not all(isinstance(one, str) for one in value):
        raise ConfigError(
            f"The option '{name}' of the data set '{spec.name}' has the wrong type.",
            expected="a list of names",
            found=repr(value),
            fix="write a list of names",
        )
    return tuple(value)
