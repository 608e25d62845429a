# SPDX-License-Identifier: Apache-2.0
"""`keelwright demo`: the whole story on the lab's organism."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keelwright.cli.heal import EXIT_CODES, show_summary
from keelwright.cli.options import Device, Json, Quiet, Seed
from keelwright.cli.screen import ScreenProgress, errors_as_exit_codes


def demo(
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<time>-demo.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Damage an aligned model by everyday tuning, measure it, repair it, verify it, and explain it. No network."""
    with errors_as_exit_codes(as_json=as_json), ScreenProgress(quiet=quiet) as progress:
        from keelwright.heal.demo import demo as run_demo

        summary = run_demo(out=out, seed=seed, device=device, progress=progress)
    show_summary(summary, as_json=as_json)
    raise typer.Exit(int(EXIT_CODES[summary["verdict"]]))
