# SPDX-License-Identifier: Apache-2.0
"""Catalogue lines of the rooms whose methods train: `harden` and `stress`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keelwright.core.catalogue import MethodLine, Status


def training_lines(line: type[MethodLine]) -> tuple[MethodLine, ...]:
    """Return the lines of both rooms.

    Args:
        line: The class of a line; given, because `core.catalogue` reads this module.
    """

    def one(
        name: str, room: str, title: str, source: str, status: Status, needs: tuple[str, ...], passes: float, kind: str
    ) -> MethodLine:
        return line(name, room, title, source, status, needs, passes, f"keelwright.{room}.{name}:{kind}")

    return (
        one(
            "lisa",
            "harden",
            "Lisa: alternate alignment and user steps, each pulled to the other's weights",
            "arXiv 2405.18641",
            "faithful",
            ("user", "safety"),
            1.0,
            "Lisa",
        ),
        one(
            "booster",
            "harden",
            "Booster: align so that one harmful step would buy little",
            "arXiv 2409.01586",
            "faithful",
            ("safety", "harmful"),
            3.0,
            "Booster",
        ),
        one(
            "poison",
            "stress",
            "A share of harmful rows in the user's file",
            "arXiv 2409.01586",
            "faithful",
            ("user", "harmful"),
            1.0,
            "Poison",
        ),
    )
