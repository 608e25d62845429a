# SPDX-License-Identifier: Apache-2.0
"""`keelwright methods`: what is in the house, from the catalogue alone."""

from __future__ import annotations

from typing import Annotated

import typer

from keelwright.cli.options import Json
from keelwright.cli.screen import errors_as_exit_codes, print_json


def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method.")] = None,
    as_json: Json = False,
) -> None:
    """List every method with its room, status, needs and source."""
    with errors_as_exit_codes(as_json=as_json):
        from keelwright.core.catalogue import catalogue, find_method

        lines = [find_method(name)] if name else list(catalogue().values())
        if as_json:
            print_json([line.to_mapping() for line in lines])
            return
        from rich.table import Table

        from keelwright.cli.screen import stdout_console

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for title in ("name", "room", "status", "needs", "source"):
            table.add_column(title, no_wrap=title != "source")
        for line in lines:
            table.add_row(line.name, line.room, line.status, ", ".join(line.needs), line.source)
        console = stdout_console()
        console.print(table)
        if name:
            console.print(f"\n{lines[0].title}.", markup=False)
