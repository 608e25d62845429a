# SPDX-License-Identifier: Apache-2.0
"""`keelwright runs`: what was done, read from the run folders alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from keelwright.cli.options import Json, Offline, Quiet
from keelwright.cli.screen import ScreenProgress, errors_as_exit_codes, print_json, stdout_console

app = typer.Typer(help="List, show, export, judge again and replay runs.", no_args_is_help=True)

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
                "verdict": _verdict(one.summary or {}),
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


def _verdict(summary: Mapping[str, Any]) -> str | None:
    """Return what a repair or a gate decided; other commands decide nothing."""
    return summary.get("verdict") or summary.get("outcome")


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
    from keelwright.cli.results import show_result

    show_result({**found.summary, "run": str(run)})


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


@app.command()
def export(
    run: Folder,
    to: Annotated[str, typer.Option(help="inspect (logs that `inspect view` opens) or parquet (one flat table).")],
    out: Annotated[Path, typer.Option(help="A file, or for inspect also a folder: one log per model.")],
    as_json: Json = False,
) -> None:
    """Write a run's records for another program."""
    with errors_as_exit_codes(as_json=as_json):
        from keelwright.heal.export import export as export_run

        files = [str(one) for one in export_run(run, to=to, out=out)]
    if as_json:
        print_json({"files": files})
    else:
        typer.echo("\n".join(files))


@app.command()
def judge(
    run: Folder,
    judges: Annotated[list[str], typer.Option("--judge", help="NAME, NAME:MODEL or NAME:openai:MODEL; repeatable.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<time>-audit.")] = None,
    judge_url: Annotated[str | None, typer.Option(help="The server of judges named NAME:openai:MODEL.")] = None,
    cache: Annotated[str | None, typer.Option(help="File of verdicts that audits share (SQLite).")] = None,
    data: Annotated[str | None, typer.Option(help="Folder of data sets, or hub; default as the audit's.")] = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Judge an audit's answers again, without its model, into a run of its own."""
    with errors_as_exit_codes(as_json=as_json), ScreenProgress(quiet=quiet) as progress:
        from keelwright.heal.export import judge_again

        places = {"judge_url": judge_url, "cache": cache, "data": data, "offline": offline}
        summary = judge_again(run, judges=judges, out=out, progress=progress, **places)
    if as_json:
        print_json(summary)
    else:
        from keelwright.cli.results import show_result

        show_result(summary)
