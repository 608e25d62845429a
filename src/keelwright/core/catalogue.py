# SPDX-License-Identifier: Apache-2.0
"""The catalogue: one line per method, read without importing any.

Packages outside the tree join through the entry point group `keelwright.methods`; each entry point names a
`MethodLine`, and is loaded only when methods are listed or looked up.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

from keelwright.core.config import nearest
from keelwright.core.errors import ConfigError

Status = Literal["verified", "faithful", "reconstruction"]
"""verified: equal to the official code or a published known answer; faithful: from the paper, nothing to compare
with; reconstruction: the source leaves a gap, named in the method's docstring."""

ENTRY_POINT_GROUP = "keelwright.methods"


@dataclass(frozen=True, slots=True)
class MethodLine:
    """What is known of a method without importing it."""

    name: str
    room: str
    title: str
    source: str
    status: Status
    needs: tuple[str, ...]
    """Roles and inputs: models, data."""
    passes_per_step: int
    """Forward and backward passes per optimiser step; 0 for pure weight arithmetic."""
    path: str
    """`package.module:Class` of the thin class that meets the room's protocol."""

    def to_mapping(self) -> dict[str, Any]:
        """Return what `keelwright methods --json` prints for the method."""
        row = dataclasses.asdict(self)
        del row["path"]
        return row

    def load(self) -> Any:
        """Import the method and return its class."""
        module, _, attribute = self.path.partition(":")
        return getattr(importlib.import_module(module), attribute)


_OWN = (
    MethodLine(
        name="linear",
        room="repair",
        title="Linear interpolation between the aligned and the tuned model",
        source="arXiv 2412.19512",
        status="faithful",
        needs=("aligned", "tuned"),
        passes_per_step=0,
        path="keelwright.repair.linear:Linear",
    ),
    MethodLine(
        name="resta",
        room="repair",
        title="RESTA: add the safety vector, aligned minus un-aligned, to the tuned model",
        source="arXiv 2402.11746",
        status="reconstruction",
        needs=("aligned", "unaligned", "tuned"),
        passes_per_step=0,
        path="keelwright.repair.resta:Resta",
    ),
)


@functools.cache
def catalogue() -> dict[str, MethodLine]:
    """Return every known method by name, our own first, then those of installed packages by name.

    Raises:
        ConfigError: A package names a method that exists already, or offers something that is no `MethodLine`.
    """
    lines = {line.name: line for line in _OWN}
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda one: one.name):
        line = point.load()
        if not isinstance(line, MethodLine) or line.name in lines:
            raise ConfigError(
                f"The entry point '{point.name}' of group '{ENTRY_POINT_GROUP}' cannot join the catalogue.",
                expected="a keelwright.core.catalogue.MethodLine with a name of its own",
                found=repr(line),
                fix=f"mend or uninstall the package that provides '{point.value}'",
            )
        lines[line.name] = line
    return lines


def find_method(name: str, *, room: str | None = None) -> MethodLine:
    """Return the catalogue line of `name`, with dashes read as underscores.

    Raises:
        ConfigError: No such method (the nearest name is offered), or it lives in another room.
    """
    wanted = name.replace("-", "_")
    lines = {key: line for key, line in catalogue().items() if room in (None, line.room)}
    if wanted not in lines:
        kind = f"{room} method" if room else "method"
        raise ConfigError(
            f"There is no {kind} '{name}'.",
            expected=f"one of {', '.join(lines)}",
            found=name,
            fix=nearest(wanted, lines),
        )
    return lines[wanted]
