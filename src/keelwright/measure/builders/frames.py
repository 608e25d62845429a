# SPDX-License-Identifier: Apache-2.0
"""Frames: how a request is put together with its user's profile, as versioned data that users can replace.

A frame file has a `name`, a template for each domain (`QA`, `autonomous`) with the slots {profile} and {instruction},
perhaps a `system` message, and perhaps `attacks`: texts that are added after the request. The shipped frame is in our
own words; whoever has the official one passes its path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import yaml

from keelwright.core.config import require_choice
from keelwright.core.errors import DataError, MissingError

SHIPPED: Final = "user-frame@1"
SLOTS: Final = ("profile", "instruction")
NO_ATTACK: Final = "none"

_KEYS: Final = ("name", "system", "QA", "autonomous", "attacks")
_SLOT: Final = re.compile(r"\{(profile|instruction)\}")


@dataclass(frozen=True, slots=True)
class Framed:
    """A prompt, in two pieces between which a list of what is off limits can go: right after the profile."""

    before: str
    after: str

    @property
    def prompt(self) -> str:
        """The prompt without such a list."""
        return self.before + self.after


@dataclass(frozen=True, slots=True)
class Frame:
    """Templates by domain."""

    name: str
    templates: Mapping[str, str]
    system: str | None = None
    attacks: Mapping[str, str] = field(default_factory=dict)

    def fill(self, domain: str, *, profile: str, instruction: str, attack: str = NO_ATTACK) -> Framed:
        """Return the prompt of one request; slots are filled once, whatever the texts hold.

        Raises:
            ConfigError: The frame has no such domain or attack.
        """
        require_choice("domain", domain, self.templates)
        require_choice("attack", attack, (NO_ATTACK, *self.attacks))
        before, _, after = self.templates[domain].partition("{profile}")
        texts = {"profile": profile, "instruction": instruction}
        added = "" if attack == NO_ATTACK else f"\n\n{self.attacks[attack]}"
        return Framed(_filled(before, texts) + profile, _filled(after, texts) + added)

    def wording(self) -> dict[str, Any]:
        """Return everything that decides a prompt, for a digest."""
        return asdict(self)


def read_frame(name: str) -> Frame:
    """Return the shipped frame, or the one of a YAML file.

    Args:
        name: `user-frame@1`, or a path.

    Raises:
        MissingError: There is no such file.
        DataError: The file is no frame.
    """
    if name == SHIPPED:
        shipped = files("keelwright.measure.builders").joinpath("wording", "user-frame-1.yaml")
        return parse_frame(shipped.read_text(encoding="utf-8"), where=name)
    path = Path(name)
    if not path.is_file():
        raise MissingError(
            f"There is no frame '{name}'.",
            expected=f"{SHIPPED}, or the path of a YAML file with {', '.join(_KEYS)}",
            found="a folder" if path.is_dir() else "nothing",
            fix="check the path",
        )
    try:
        return parse_frame(path.read_text(encoding="utf-8-sig"), where=name)
    except UnicodeDecodeError as error:
        raise DataError(f"'{name}' is not UTF-8 text.", expected="UTF-8", found=str(error), fix="save it so") from error


def parse_frame(text: str, *, where: str) -> Frame:
    """Return the frame that a YAML text describes; attacks that it leaves out are those of the shipped frame.

    Raises:
        DataError: It is no frame.
    """
    try:
        document: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _no_frame(where, " ".join(str(error).split())) from error
    if not isinstance(document, dict) or not isinstance(document.get("name"), str):
        raise _no_frame(where, "no mapping with a name")
    unknown = [str(key) for key in document if key not in _KEYS]
    if unknown:
        raise _no_frame(where, f"the key '{unknown[0]}'")
    templates = {domain: document[domain] for domain in ("QA", "autonomous") if domain in document}
    attacks = document.get("attacks", {})
    if not isinstance(attacks, dict) or not all(
        isinstance(one, str) for one in (*templates.values(), *attacks.values())
    ):
        raise _no_frame(where, "a template or an attack that is no text")
    for domain, template in templates.items():
        slots = _SLOT.findall(template)
        if sorted(slots) != sorted(SLOTS) or slots[0] != "profile":
            raise _no_frame(where, f"slots {', '.join(slots) or 'none'} in {domain}")
    if not templates:
        raise _no_frame(where, "no template")
    own = attacks if "attacks" in document or where == SHIPPED else read_frame(SHIPPED).attacks
    return Frame(document["name"], templates, document.get("system"), own)


def _filled(template: str, texts: Mapping[str, str]) -> str:
    return _SLOT.sub(lambda slot: texts[slot[1]], template)


def _no_frame(where: str, found: str) -> DataError:
    return DataError(
        f"{where} is no frame.",
        expected="a name, and QA or autonomous with the slots {profile} and then {instruction}, each once",
        found=found,
        fix="mend the file",
    )
