# SPDX-License-Identifier: Apache-2.0
"""`keelwright tune MODEL --data FILE --out DIR`: tune a model and say what it cost in safety."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keelwright.cli import tuning_options as own
from keelwright.cli.options import Device, Json, Limit, Offline, Quiet, Run, Seed, Suites, Utility
from keelwright.cli.screen import ScreenProgress, errors_as_exit_codes, print_json
from keelwright.core.errors import ExitCode

EXIT_CODES = {
    "pass": ExitCode.DONE,
    "fail": ExitCode.GATE_FAILED,
    "not measurable": ExitCode.NOT_MEASURABLE,
}


def tune(
    model: Annotated[str, typer.Argument(help="Hub id[@revision], folder, FOLDER+ADAPTER or lab:NAME.")],
    data: Annotated[Path, typer.Option(help="JSON lines of the rows to tune on (prompt, answer).")],
    out: Annotated[Path, typer.Option(help="Where the tuned model goes.")],
    defence: Annotated[
        str | None, typer.Option(help="A defence that acts within the tuning (see `keelwright methods --room harden`).")
    ] = None,
    policy: Annotated[str, typer.Option(help="Policy file of the gate (YAML), or default.")] = "default",
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
    """Audit a model, tune it on your rows, audit it again on the same items, and hold the change to a policy.

    The tuned model is written whatever the verdict. Exit codes: 0 pass, 4 fail, 6 not measurable with so few items.
    """
    given = dict(locals())
    with errors_as_exit_codes(as_json=as_json), ScreenProgress(quiet=quiet) as progress:
        from keelwright.arena.tune import tune as run_tune

        files = {role: file for role, file in own.files_of(given).items() if role != "user"}
        summary = run_tune(
            model,
            data=data,
            out=out,
            defence=defence,
            files=files,
            method_settings=own.method_settings(set_, [defence] if defence else []),
            policy=policy,
            run=run,
            progress=progress,
            **own.settings_of(given),
        )
    if as_json:
        print_json(summary)
    else:
        from keelwright.cli.tuning_results import show_tuning

        show_tuning(summary)
    raise typer.Exit(int(EXIT_CODES[summary["gate"]["outcome"]]))
