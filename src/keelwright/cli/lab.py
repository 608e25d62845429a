# SPDX-License-Identifier: Apache-2.0
"""`keelwright lab`: the synthetic worlds and their organisms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keelwright.cli.options import Json, Quiet, Seed
from keelwright.cli.screen import ScreenProgress, errors_as_exit_codes, print_json, stdout_console

app = typer.Typer(help="The lab: small worlds in which a rule says whether an answer is harmful.", no_args_is_help=True)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the organisms that ship with keelwright."""
    with errors_as_exit_codes(as_json=as_json):
        from keelwright.worlds.organisms import list_organisms

        found = list_organisms()
    if as_json:
        print_json(found)
        return
    console = stdout_console()
    for row in found:
        console.print(f"{row['name']}  {row['says']}", markup=False, soft_wrap=True)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="lab:workshop/aligned, lab:workshop/base")],
    as_json: Json = False,
) -> None:
    """Show an organism's card: what it is, how it was made, how healthy it is."""
    with errors_as_exit_codes(as_json=as_json):
        from keelwright.worlds.organisms import show as show_organism

        card = show_organism(name)
    if as_json:
        print_json(card)
    else:
        stdout_console().print(card["card"], markup=False, soft_wrap=True)


@app.command()
def build(
    name: Annotated[str, typer.Argument(help="World to build: workshop, pictures, or code.")] = "workshop",
    out: Annotated[Path, typer.Option(help="Folder for the organisms, one folder each.")] = Path("organisms"),
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a world's organisms from a seed, under three minutes of CPU."""
    with errors_as_exit_codes(as_json=as_json), ScreenProgress(quiet=quiet) as progress:
        from keelwright.runs.places import require_place

        require_place(out, flag="--out")
        if name == "pictures":
            from keelwright.worlds.pictures.organism import export_vision_organism

            built = export_vision_organism(out, seed, progress=progress)
        elif name == "code":
            from keelwright.worlds.code.organism import export_code_organisms

            built = export_code_organisms(out, seed, progress=progress)
        else:
            from keelwright.worlds.organisms import build as build_organisms

            built = build_organisms(name, seed=seed, out=out, progress=progress)
    if as_json:
        print_json(built)
    else:
        stdout_console().print(f"{out}: {', '.join(sorted(built['organisms']))}", markup=False)
