# SPDX-License-Identifier: Apache-2.0
"""`keelwright stress KIND MODEL`: what a tuning does to a model's safety, over its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keelwright.cli import tuning_options as own
from keelwright.cli.options import Device, Json, Limit, Offline, Quiet, Run, Seed, Suites, Utility
from keelwright.cli.screen import ScreenProgress, errors_as_exit_codes, print_json


def stress(
    kind: Annotated[str, typer.Argument(help="A stress (see `keelwright methods --room stress`); several: a,b.")],
    model: Annotated[str, typer.Argument(help="Hub id[@revision], folder, FOLDER+ADAPTER or lab:NAME.")],
    defences: Annotated[
        list[str] | None, typer.Option("--defence", help="A method of harden to compare with; repeatable.")
    ] = None,
    guards: Annotated[
        list[str] | None,
        typer.Option("--guard", help="For virus: a guard model of yours that screens rows; repeatable."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="JSON lines of the user's rows (prompt, answer).")] = None,
    harmful: own.Harmful = None,
    safety: own.Safety = None,
    ordinary: own.Ordinary = None,
    borderline: own.Borderline = None,
    identity: own.Identity = None,
    set_: own.Settings = None,
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
    harden_steps: own.HardenSteps = 100,
    harden_lr: own.HardenLr = None,
    harden_batch: own.HardenBatch = 32,
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
    """Tune a model in memory in ways that may break its safety, and measure it over the steps; nothing is written.

    A tuning that is known to break safety always runs beside, so that a small figure can be believed.
    """
    given = dict(locals())
    with errors_as_exit_codes(as_json=as_json), ScreenProgress(quiet=quiet) as progress:
        from keelwright.arena.stress import stress as run_stress

        kinds = own.names_of(kind)
        summary = run_stress(
            kinds,
            model,
            files=own.files_of(given),
            defences=defences or [],
            guards=guards or [],
            method_settings=own.method_settings(set_, [*kinds, *(defences or [])]),
            run=run,
            progress=progress,
            **own.settings_of(given),
        )
    if as_json:
        print_json(summary)
    else:
        from keelwright.cli.tuning_results import show_tuning

        show_tuning(summary)
