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


@dataclass(frozen=True, slots=True)
class Nested:
    """A frame around a framed request; where both have a system message, the outer one's comes first."""

    outer: Asking
    inner: Asking

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.outer.name} around {self.inner.name}"

    @property
    def says(self) -> str:
        """What is around a request."""
        return f"{self.outer.says} Within it: {self.inner.says}"

    def ask(self, prompt: str, system: str | None) -> tuple[str, str | None]:
        """Return the prompt and the system message in both frames."""
        prompt, within = self.inner.ask(prompt, system)
        prompt, around = self.outer.ask(prompt, None)
        return prompt, " ".join(one for one in (around, within) if one is not None) or None


PLAIN = Framed()
"""Requests as they are."""


def nested(outer: Asking, inner: Asking) -> Asking:
    """Return one frame around another; the only one where the other leaves requests as they are."""
    if PLAIN.name in (outer.name, inner.name):
        return inner if outer.name == PLAIN.name else outer
    return Nested(outer, inner)


def framed_row(asking: Asking, row: ChatRow) -> ChatRow:
    """Return a training row in the frame."""
    prompt, system = asking.ask(row.prompt, row.system)
    return replace(row, prompt=prompt, system=system)


def framed_item(asking: Asking, item: Item) -> Item:
    """Return an item in the frame; its id stays, so that answers with and without the frame can be paired."""
    prompt, system = asking.ask(item.prompt, item.system)
    return replace(item, prompt=prompt, system=system)
