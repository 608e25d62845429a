# SPDX-License-Identifier: Apache-2.0
"""The command line: one file per command, each of which imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from keelwright import __version__
from keelwright.cli.arena import app as arena
from keelwright.cli.audit import audit
from keelwright.cli.compare import compare
from keelwright.cli.demo import demo
from keelwright.cli.gate import gate
from keelwright.cli.harden import harden
from keelwright.cli.heal import heal
from keelwright.cli.lab import app as lab
from keelwright.cli.methods import methods
from keelwright.cli.repair import repair
from keelwright.cli.runs import app as runs
from keelwright.cli.screen import print_json_error
from keelwright.cli.stress import stress
from keelwright.cli.tune import tune
from keelwright.cli.weights import app as weights
from keelwright.core.errors import ExitCode

# Some versions of typer carry their own copy of click, so the class is reached through typer.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class _JsonGroup(TyperGroup):
    """Commands whose `--json` holds for a mistyped command line too: one document on stdout."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["keelwright.json"] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            if ctx.meta["keelwright.json"]:
                problem = error.format_message()  # type: ignore[attr-defined]
                print_json_error("UsageError", ExitCode.BAD_INPUT, problem, fix="see the command's --help")
            raise


app = typer.Typer(
    name="keelwright",
    cls=_JsonGroup,
    help="Keep a machine-learned model safe while it is being changed.",
    epilog="Start with `keelwright demo`: no network, no download, about a minute.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (demo, heal, audit, compare, gate, repair, tune, harden, stress, methods):
    app.command()(command)
app.add_typer(arena, name="arena")
app.add_typer(lab, name="lab")
app.add_typer(runs, name="runs")
app.add_typer(weights, name="weights")


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
