# SPDX-License-Identifier: Apache-2.0
"""The command line: one file per command, each of which imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from keelwright import __version__
from keelwright.cli.audit import audit
from keelwright.cli.compare import compare
from keelwright.cli.demo import demo
from keelwright.cli.heal import heal
from keelwright.cli.lab import app as lab
from keelwright.cli.methods import methods
from keelwright.cli.repair import repair
from keelwright.cli.runs import app as runs

app = typer.Typer(
    name="keelwright",
    help="Keep a machine-learned model safe while it is being changed.",
    epilog="Start with `keelwright demo`: no network, no download, about a minute.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (demo, heal, audit, compare, repair, methods):
    app.command()(command)
app.add_typer(lab, name="lab")
app.add_typer(runs, name="runs")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"keelwright {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; the entry point of the `keelwright` script."""
    app()
