# SPDX-License-Identifier: Apache-2.0
"""`keelwright harden METHOD MODEL --out DIR`: prepare a model for tuning, or tune it with a defence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keelwright.cli import tuning_options as own
from keelwright.cli.options import Device, Json, Limit, Offline, Quiet, Run, Seed, Suites, Utility
from keelwright.cli.screen import ScreenProgress, errors_as_exit_codes, print_json


def harden(
    method: Annotated[str, typer.Argument(help="A defence (see `keelwright methods --room harden`).")],
    model: Annotated[str, typer.Argument(help="Hub id[@revision], folder, FOLDER+ADAPTER or lab:NAME.")],
    out: Annotated[Path, typer.Option(help="Where the hardened model goes.")],
    stresses: Annotated[
        list[str] | None,
        typer.Option("--stress", help="A stress to put the hardened model under afterwards, in memory; repeatable."),
    ] = None,
    k: Annotated[
        str, typer.Option("--k", help="Safety rows to compare, with commas: 0,100,300; the knee of the curve is kept.")
    ] = "",
    data: Annotated[Path | None, typer.Option(help="JSON lines of the user's rows (prompt, answer).")] = None,
    harmful: own.Harmful = None,
    safety: own.Safety = None,
    ordinary: own.Ordinary = None,
    borderline: own.Borderline = None,
    identity: own.Identity = None,
    set_: own.Settings = None,
    harden_steps: own.HardenSteps = 100,
    harden_lr: own.HardenLr = None,
    harden_batch: own.HardenBatch = 32,
    steps: own.Steps = None,
    epochs: own.Epochs = None,
    lr: own.Lr = None,
    batch_size: own.RowsPerStep = None,
    lora_rank: own.LoraRank = None,
    accumulate: own.Accumulate = 1,
    precision: own.Precision = "stored",
    gradient_checkpointing: own.Checkpointing = False,
    too_long: own.TooLong = "error",
    at: own.At = "",
    seeds: own.Seeds = 1,
    suite: Suites = "auto",
    judges: own.Judges = None,
    sets: own.Sets = None,
    utility: Utility = None,
    limit: Limit = None,
    max_new_tokens: own.MaxNewTokens = None,
    answers_at_once: own.AnswersAtOnce = 64,
    allow_pickle: own.Pickle = False,
    run: Run = None,
    seed: Seed = 0,
    device: Device = "auto",
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a model with a defence, write it, and measure it before and after.

    --harden-steps, -lr and -batch are of a defence that acts beforehand; --steps, --lr, --batch-size of the tuning.
    """
    given = dict(locals())
    with errors_as_exit_codes(as_json=as_json), ScreenProgress(quiet=quiet) as progress:
        from keelwright.arena.harden import harden as run_harden

        summary = run_harden(
            method,
            model,
            out=out,
            files=own.files_of(given),
            stresses=stresses or [],
            doses=own.steps_of(k, flag="--k"),
            method_settings=own.method_settings(set_, [method, *(stresses or [])]),
            run=run,
            progress=progress,
            **own.settings_of(given),
        )
    if as_json:
        print_json(summary)
    else:
        from keelwright.cli.tuning_results import show_tuning

        show_tuning(summary)
