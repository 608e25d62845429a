# SPDX-License-Identifier: Apache-2.0
"""`keelwright audit`: records, estimates and a report of one model, or of the change between two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keelwright.cli.options import BatchSize, Device, Json, Limit, Offline, Quiet, Seed, Suite, Utility
from keelwright.cli.screen import ScreenProgress, errors_as_exit_codes, metrics_table, print_json, stdout_console


def audit(
    model: Annotated[str, typer.Argument(help="Hub id[@revision], folder, FOLDER+ADAPTER or lab:NAME.")],
    against: Annotated[str | None, typer.Option(help="Compare with this model on the same items.")] = None,
    suite: Suite = "auto",
    utility: Utility = None,
    limit: Limit = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer in tokens; default: the suite's.", min=1)
    ] = None,
    batch_size: BatchSize = 64,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also open pickled weights, as tensors only.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<time>-audit.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure a model's safety: every rate with its count and interval."""
    with errors_as_exit_codes(as_json=as_json), ScreenProgress(quiet=quiet) as progress:
        from keelwright.heal.audit import audit as run_audit

        summary = run_audit(
            model,
            against=against,
            suite=suite,
            utility=utility,
            limit=limit,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            allow_pickle=allow_pickle,
            run=out,
            seed=seed,
            device=device,
            offline=offline,
            progress=progress,
        )
    if as_json:
        print_json(summary)
        return
    console = stdout_console()
    console.print(f"{summary['sentence']}\n", style="bold", markup=False, soft_wrap=True)
    console.print(metrics_table(summary))
    console.print(f"report  {summary['run']}/report.html", markup=False, soft_wrap=True)
