# SPDX-License-Identifier: Apache-2.0
"""Suites as YAML: read, composed and checked before anything is loaded.

A suite is a name, a sentence, a version and parts; a part names sets, a builder, judges, decoding and metrics (the
fields of `measure.part.PartSpec`). `suites:` takes the parts of others in. On the command line names and files are
joined by commas: `--suite core,over-refusal,./mine.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import yaml

from keelwright.core.config import config_from_mapping, nearest
from keelwright.core.errors import ConfigError, DataError, MissingError
from keelwright.measure.part import PartSpec

_KEYS: Final = ("name", "says", "version", "parts", "suites")
_EXAMPLE: Final = 'name, says, and parts such as "- {sets: [xstest], judges: [refusal-lists]}"'
BUILT_IN: Final = ("core", "workshop")
"""Suites that are code: their items are made or shipped by the package."""


@dataclass(frozen=True, slots=True)
class SuiteSpec:
    """A suite, read and composed; nothing is loaded yet."""

    name: str
    says: str
    version: int
    parts: tuple[PartSpec, ...]


def suite_names() -> tuple[str, ...]:
    """Return the names of all suites that ship with the package."""
    shipped = (path.name for path in files("keelwright.measure.suites").iterdir() if path.name.endswith(".yaml"))
    return (*BUILT_IN, *sorted(name.removesuffix(".yaml") for name in shipped))


def read_suite(text: str) -> SuiteSpec:
    """Return the suite that a name, a YAML file, or several joined by commas stand for.

    Raises:
        ConfigError: There is no suite of that name, or a key or value of the file is wrong.
        MissingError: There is no such file.
        DataError: The file is not YAML.
    """
    names = [one.strip() for one in text.split(",") if one.strip()]
    found = [_read(name, ()) for name in names]
    if not found:
        raise ConfigError(
            "No suite was named.",
            expected=f"one or more of {', '.join(suite_names())}, or a YAML file",
            found=repr(text),
            fix="name one",
        )
    if len(found) == 1:
        return found[0]
    parts = tuple(part for one in found for part in one.parts)
    return SuiteSpec(" + ".join(one.name for one in found), " ".join(one.says for one in found), 1, _distinct(parts))


def _read(name: str, within: tuple[str, ...]) -> SuiteSpec:
    if name in within:
        raise ConfigError(
            f"The suite '{name}' contains itself.",
            expected="suites that end in parts",
            found=" -> ".join([*within, name]),
            fix="remove one of them",
        )
    if name in BUILT_IN:
        return SuiteSpec(name, "", 1, (PartSpec(sets=(name,), builder="suite", name=name),))
    if name.endswith((".yaml", ".yml")):
        return _parse(_read_file(Path(name)), where=name, within=(*within, name))
    if name not in suite_names():
        raise ConfigError(
            f"There is no suite '{name}'.",
            expected=f"one of {', '.join(suite_names())}, or a file that ends in .yaml",
            found=name,
            fix=nearest(name, suite_names()),
        )
    text = files("keelwright.measure.suites").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return _parse(text, where=f"suite {name}", within=(*within, name))


def _read_file(path: Path) -> str:
    if not path.is_file():
        raise MissingError(
            f"There is no suite file '{path}'.",
            expected="a YAML file",
            found="a folder" if path.is_dir() else "nothing",
            fix="check the path",
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8 text.", expected="a UTF-8 YAML file", found=str(error), fix="save it as UTF-8"
        ) from error


def _parse(text: str, *, where: str, within: tuple[str, ...]) -> SuiteSpec:
    try:
        document: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(
            f"{where} is not YAML.", expected=_EXAMPLE, found=" ".join(str(error).split()), fix="mend the file"
        ) from error
    if not isinstance(document, dict):
        raise ConfigError(f"{where} is not a suite.", expected=_EXAMPLE, found=type(document).__name__, fix="mend it")
    for key in document:
        if key not in _KEYS:
            raise ConfigError(
                f"{where}: a suite has no key '{key}'.",
                expected=f"one of {', '.join(_KEYS)}",
                found=str(key),
                fix=nearest(str(key), _KEYS),
            )
    name, says = str(document.get("name") or ""), " ".join(str(document.get("says") or "").split())
    own = [_part(one, name, says, where=where) for one in _list(document, "parts", where)]
    others = [part for one in _list(document, "suites", where) for part in _read(str(one), within).parts]
    if not name or not (own or others):
        raise ConfigError(
            f"{where} is not a whole suite.",
            expected="a name, and parts or suites",
            found=f"keys {', '.join(map(str, document)) or 'none'}",
            fix=f"write {_EXAMPLE}",
        )
    return SuiteSpec(name, says, int(document.get("version", 1)), _distinct((*own, *others)))


def _list(document: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = document.get(key) or []
    if not isinstance(value, list):
        raise ConfigError(
            f"{where}: '{key}' is not a list.", expected="a list", found=type(value).__name__, fix="write it as a list"
        )
    return value


def _part(value: Any, name: str, says: str, *, where: str) -> PartSpec:
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where}: a part is not a mapping.", expected=_EXAMPLE, found=type(value).__name__, fix="mend the part"
        )
    plain = {key: tuple(one) if isinstance(one, list) else one for key, one in value.items()}
    part = config_from_mapping(PartSpec, plain, where=where)
    if not part.sets:
        raise ConfigError(f"{where}: a part names no set.", expected="sets: [xstest]", found="none", fix="name one")
    return replace(part, name=part.name or name, says=" ".join((part.says or says).split()))


def _distinct(parts: tuple[PartSpec, ...]) -> tuple[PartSpec, ...]:
    """Return the parts without repetitions; parts that share a name and differ are numbered."""
    kept: list[PartSpec] = []
    for part in parts:
        if part in kept:
            continue
        count = sum(one.name == part.name or one.name.startswith(f"{part.name} ") for one in kept)
        kept.append(part if count == 0 else replace(part, name=f"{part.name} {count + 1}"))
    return tuple(kept)
