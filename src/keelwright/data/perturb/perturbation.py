# SPDX-License-Identifier: Apache-2.0
"""Perturbations as data: what a set's YAML file says of each, read and checked.

A file has a `name`, a sentence under `says`, and `perturbations`: each with name, family, semantics, needs, and a
template (families that add text) or settings (the others). In a template, `{entry_point}` and every other need that
is text stands for the item's own; a need that keelwright does not know is looked up in the item's materials.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, Literal, get_args

import yaml

from keelwright.core.config import nearest
from keelwright.core.digests import json_digest
from keelwright.core.errors import DataError, MissingError

Family = Literal[
    "identity", "misleading_suffix", "distraction_suffix", "degrade_request", "poor_examples", "natural_noise"
]
Semantics = Literal["preserved", "contradicted"]

SHIPPED: Final = "degrade-v1"
ADDING: Final[tuple[Family, ...]] = ("misleading_suffix", "distraction_suffix", "degrade_request")
"""Families that add a filled template to the prompt."""

SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "poor_examples": ("kind", "examples", "opening", "example", "closing"),
    "natural_noise": ("kind", "share"),
}
"""Settings by family; the others have none."""

_SLOT: Final = re.compile(r"\{(\w+)\}")
_KEYS: Final = ("name", "family", "semantics", "needs", "template", "settings")
_FIX: Final = "see keelwright/data/perturb/degrade-v1.yaml for a whole file"


@dataclass(frozen=True, slots=True)
class Perturbation:
    """One way to put a problem badly."""

    name: str
    family: Family
    semantics: Semantics
    """preserved: a right solution of the clean problem still does what is asked; contradicted: it does not."""
    needs: tuple[str, ...] = ()
    """What an item must have; items without are left out and counted."""
    template: str = ""
    """Text to add, with slots in braces."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the families that add no text."""

    def fill(self, values: Mapping[str, str]) -> str:
        """Return the template with its slots filled, each once, whatever the values hold."""
        return _SLOT.sub(lambda slot: values[slot[1]], self.template)


@dataclass(frozen=True, slots=True)
class PerturbationSet:
    """A named, versioned set."""

    name: str
    says: str
    perturbations: tuple[Perturbation, ...]
    digest: str
    """Of everything that decides a prompt."""


def read_perturbations(name: Path | str = SHIPPED) -> PerturbationSet:
    """Read a shipped set, or one of your own.

    Args:
        name: `degrade-v1`, or the path of a YAML file.

    Raises:
        MissingError: There is no such file.
        DataError: The file is not a set of perturbations.
    """
    if str(name) == SHIPPED:
        text = files("keelwright.data.perturb").joinpath(f"{SHIPPED}.yaml").read_text(encoding="utf-8")
        return parse_perturbations(text, where=SHIPPED)
    path = Path(name)
    if not path.is_file():
        raise MissingError(
            f"There is no set of perturbations '{name}'.",
            expected=f"{SHIPPED}, or the path of a YAML file",
            found="a folder" if path.is_dir() else "nothing",
            fix="check the path",
        )
    try:
        return parse_perturbations(path.read_text(encoding="utf-8-sig"), where=str(name))
    except UnicodeDecodeError as error:
        raise _malformed(str(name), f"text that is not UTF-8: {error}") from error


def parse_perturbations(text: str, *, where: str) -> PerturbationSet:
    """Return the set that a YAML text describes.

    Args:
        text: The file's contents.
        where: The file's name, for error texts.

    Raises:
        DataError: It is not a set of perturbations; the entry is named.
    """
    try:
        document: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _malformed(where, " ".join(str(error).split())) from error
    if not isinstance(document, dict) or not isinstance(document.get("name"), str):
        raise _malformed(where, "no mapping with a name")
    rows = document.get("perturbations")
    if not isinstance(rows, list) or not rows:
        raise _malformed(where, "no list under 'perturbations'")
    found: dict[str, Perturbation] = {}
    for number, row in enumerate(rows, 1):
        one = _read(row, f"{where}, perturbation {number}")
        if one.name in found:
            raise _malformed(where, f"the name '{one.name}' a second time")
        found[one.name] = one
    return PerturbationSet(
        name=document["name"],
        says=str(document.get("says", "")),
        perturbations=tuple(found.values()),
        digest=json_digest([document["name"], rows]),
    )


def _read(row: Any, where: str) -> Perturbation:
    if not isinstance(row, dict):
        raise _malformed(where, f"a {type(row).__name__}")
    for key in row:
        if key not in _KEYS:
            raise DataError(
                f"{where}: unknown key '{key}'.",
                expected=f"keys out of {', '.join(_KEYS)}",
                found=str(key),
                fix=nearest(str(key), _KEYS),
            )
    name: Any = row.get("name")
    family: Any = row.get("family")
    semantics: Any = row.get("semantics")
    needs, template, settings = row.get("needs", []), row.get("template", ""), row.get("settings", {})
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise _malformed(where, f"the name {name!r}: letters, digits, '_', '-' and '.' alone")
    for key, value, choices in (("family", family, get_args(Family)), ("semantics", semantics, get_args(Semantics))):
        if value not in choices:
            raise DataError(
                f"{where}: '{key}' is not a known one.",
                expected=f"one of {', '.join(choices)}",
                found=str(value),
                fix=nearest(str(value), choices),
            )
    if not isinstance(needs, list) or not all(isinstance(need, str) for need in needs):
        raise _malformed(where, "needs that are not a list of names")
    if not isinstance(template, str) or not isinstance(settings, dict):
        raise _malformed(where, "a template that is no text, or settings that are no mapping")
    for key in settings:
        if key not in SETTINGS.get(family, ()):
            raise _malformed(where, f"the setting '{key}' with the family {family}")
    if bool(template.strip()) != (family in ADDING):
        raise _malformed(where, f"{'no' if family in ADDING else 'a'} template with the family {family}")
    unnamed = [slot for slot in _SLOT.findall(template) if slot not in needs]
    if unnamed:
        raise _malformed(where, f"the slot {{{unnamed[0]}}}, which 'needs' does not name")
    return Perturbation(name, family, semantics, tuple(needs), template.strip(), settings)


def _malformed(where: str, found: str) -> DataError:
    return DataError(
        f"{where} is not a set of perturbations.",
        expected="a name, and perturbations with name, family, semantics, needs, and a template or settings",
        found=found,
        fix=_FIX,
    )
