# SPDX-License-Identifier: Apache-2.0
"""How a model is asked: the same frame around a request when it is trained and when it is tested, or on purpose not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from keelwright.core.records import Item
from keelwright.data.rows import ChatRow


class Asking(Protocol):
    """A fixed change of the words that a request comes in."""

    @property
    def name(self) -> str:
        """In records and tables: `plain` leaves every request as it is."""

    @property
    def says(self) -> str:
        """One sentence: what is around a request."""

    def ask(self, prompt: str, system: str | None) -> tuple[str, str | None]:
        """Return the prompt and the system message in their frame."""


@dataclass(frozen=True, slots=True)
class Framed:
    """A system message, and text before and after the user's words."""

    name: str = "plain"
    system: str | None = None
    """Replaces the request's own system message; None leaves it."""
    before: str = ""
    after: str = ""

    @property
    def says(self) -> str:
        """What is around a request."""
        parts = ["a system message"] if self.system is not None else []
        parts += ["words before the request"] if self.before else []
        parts += ["words after it"] if self.after else []
        return f"Every request comes with {' and '.join(parts)}." if parts else "Requests are asked as they are."

    def ask(self, prompt: str, system: str | None) -> tuple[str, str | None]:
        """Return the prompt and the system message in their frame."""
        return f"{self.before}{prompt}{self.after}", system if self.system is None else self.system


PLAIN = Framed()
"""Requests as they are."""


def framed_row(asking: Asking, row: ChatRow) -> ChatRow:
    """Return a training row in the frame."""
    prompt, system = asking.ask(row.prompt, row.system)
    return replace(row, prompt=prompt, system=system)


def framed_item(asking: Asking, item: Item) -> Item:
    """Return an item in the frame; its id stays, so that answers with and without the frame can be paired."""
    prompt, system = asking.ask(item.prompt, item.system)
    return replace(item, prompt=prompt, system=system)
