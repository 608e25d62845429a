# SPDX-License-Identifier: Apache-2.0
"""Rooms that are verbs: `keelwright.heal` is a package, and `keelwright.heal(...)` does what the command does.

Importing a room makes it an attribute of `keelwright`, where it would hide the function of the same name. So the room
itself can be called.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class VerbRoom(ModuleType):
    """A package that can be called like its main function."""

    verb: str

    def __call__(self, *args: Any, **settings: Any) -> Any:
        """Call the room's main function."""
        module, _, name = self.verb.partition(":")
        return getattr(importlib.import_module(module), name)(*args, **settings)


def make_callable(room: str, verb: str) -> None:
    """Let the package `room` be called as the function `verb`.

    Args:
        room: The package's own `__name__`.
        verb: `package.module:function`; imported when it is called.
    """
    module = sys.modules[room]
    module.__class__ = VerbRoom
    module.verb = verb  # type: ignore[attr-defined]
