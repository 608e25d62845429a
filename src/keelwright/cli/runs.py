# SPDX-License-Identifier: Apache-2.0
"""`keelwright runs`: what was done, read from the run folders alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keelwright.cli.options import Json, Quiet
from keelwright.cli.screen import ScreenProgress, errors_as_exit_codes, metrics_table, print_json, stdout_console

app = typer.Typer(help="List, show, render again and replay runs.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="A run folder.")]


@app.command()
def ls(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs in a folder, oldest first."""
    with errors_as_exit_codes(as_json=as_json):
        from keelwright.runs.folder import list_runs

        rows = [
            {
                "run": str(one.path),
                "command": one.run["command"],
                "started": one.run["started"],
                "state": "done" if one.summary else "unfinished",
                "verdict": (one.summary or {}).get("verdict"),
            }
            for one in list_runs(folder)
        ]
    if as_json:
        print_json(rows)
        return
    console = stdout_console()
    for row in rows:
        console.print(f"{row['run']}  {row['command']}  {row['verdict'] or row['state']}", markup=False)
    if not rows:
        console.print(f"no runs in '{folder}'", markup=False)


@app.command()
def show(run: Folder, as_json: Json = False) -> None:
    """Show a run's result, or how far it got."""
    with errors_as_exit_codes(as_json=as_json):
        from keelwright.runs.folder import read_run

        found = read_run(run)
    if as_json:
        print_json({"run": found.run, "summary": found.summary})
        return
    console = stdout_console()
    if found.summary is None:
        console.print(f"unfinished: {found.run['command']}, started {found.run['started']}", markup=False)
        return
    console.print(found.summary.get("sentence", ""), markup=False, soft_wrap=True)
    if "models" in found.summary:
        console.print(metrics_table(found.summary))


@app.command()
def report(run: Folder, as_json: Json = False) -> None:
    """Render `report.html` again from the run's files."""
    with errors_as_exit_codes(as_json=as_json):
        from keelwright.heal.reporting import write_report

        path = write_report(run)
    if as_json:
        print_json({"report": str(path)})
    else:
        typer.echo(str(path))


@app.command()
def replay(
    run: Folder,
    out: Annotated[Path, typer.Option(help="Folder for the replayed run and, where there is one, its model.")],
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Do a run again from its own `run.json` and say whether the result is the same."""
    with errors_as_exit_codes(as_json=as_json), ScreenProgress(quiet=quiet) as progress:
        from keelwright.heal.replay import replay as replay_run

        outcome = replay_run(run, out=out, progress=progress)
    if as_json:
        print_json(outcome)
    else:
        typer.echo(outcome["says"])
