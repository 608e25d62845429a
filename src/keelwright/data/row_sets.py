# SPDX-License-Identifier: Apache-2.0
"""Rows to train on by what they are for: what stresses and defences draw on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from keelwright.core.errors import DataError
from keelwright.data.rows import ChatRow, read_chat_rows

ROLES: Final[Mapping[str, str]] = {
    "user": "what the model is tuned for: the user's rows",
    "harmful": "harmful requests, answered",
    "safety": "harmful requests, refused",
    "ordinary": "ordinary requests and tasks, answered",
    "borderline": "requests that look harmful and are not, answered",
    "identity": "dialogues in which the model takes on an obedient persona; nothing in them is harmful",
}
"""By role: what its rows are."""

FLAGS: Final[Mapping[str, str]] = {"user": "--data", **{role: f"--{role}" for role in ROLES if role != "user"}}
"""By role: the flag that gives its file."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One harmful request with both answers."""

    harmful: ChatRow
    safety: ChatRow


@dataclass(frozen=True, slots=True)
class RowSets:
    """Rows by role; a role without rows is empty."""

    user: tuple[ChatRow, ...] = ()
    harmful: tuple[ChatRow, ...] = ()
    safety: tuple[ChatRow, ...] = ()
    ordinary: tuple[ChatRow, ...] = ()
    borderline: tuple[ChatRow, ...] = ()
    identity: tuple[ChatRow, ...] = ()

    def require(self, role: str, *, who: str) -> tuple[ChatRow, ...]:
        """Return the rows of a role.

        Args:
            role: One of `ROLES`.
            who: Who needs them, for the error text: `The defence 'booster'`.

        Raises:
            DataError: There are none.
        """
        rows: tuple[ChatRow, ...] = getattr(self, role)
        if rows:
            return rows
        raise DataError(
            f"{who} needs '{role}' rows.",
            expected=f"{FLAGS[role]} FILE: {ROLES[role]}",
            found="none",
            fix=f"give {FLAGS[role]} a JSON-lines file of prompts and answers",
        )

    def alignment(self, *, who: str) -> tuple[ChatRow, ...]:
        """Return what an alignment stage trains on: refusals, and whatever there is of answered requests.

        Raises:
            DataError: There are no refusals.
        """
        return (*self.require("safety", who=who), *self.borderline, *self.ordinary)

    def pairs(self, *, who: str) -> tuple[Pair, ...]:
        """Return the harmful requests that have both an answer and a refusal, in the order of the harmful rows.

        Raises:
            DataError: No request has both.
        """
        refusals = {(row.prompt, row.system): row for row in self.require("safety", who=who)}
        harmful = self.require("harmful", who=who)
        found = [Pair(row, refusals[key]) for row in harmful if (key := (row.prompt, row.system)) in refusals]
        if not found:
            raise DataError(
                f"{who} needs requests that are both answered and refused.",
                expected="prompts that occur in the harmful rows and in the safety rows",
                found=f"{len(harmful)} harmful and {len(refusals)} refused prompts, none in both",
                fix="write a refusal for each harmful prompt, or an answer for each refused one",
            )
        return tuple(found)


def read_row_sets(files: Mapping[str, Path | str]) -> RowSets:
    """Read rows from JSON-lines files by role.

    Raises:
        KeelwrightError: As `read_chat_rows` does.
    """
    return RowSets(**{role: tuple(read_chat_rows(path)) for role, path in files.items()})
