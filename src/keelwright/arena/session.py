# SPDX-License-Identifier: Apache-2.0
"""A run of `stress`, `harden` or `tune` from its plan to its page; the same command on the same folder resumes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from keelwright.arena.arms import Chosen
from keelwright.arena.config import TuningConfig
from keelwright.arena.job import Job
from keelwright.arena.keeping import require_free, require_output
from keelwright.arena.reporting import ensure_report, write_report
from keelwright.arena.results import Ledger
from keelwright.core.config import config_to_mapping
from keelwright.core.digests import file_digest
from keelwright.core.errors import ConfigError
from keelwright.core.files import require_new_folder
from keelwright.core.protocols import Progress
from keelwright.models.threads import threads_for
from keelwright.runs.folder import RunFolder, RunSpec, stopwatch

FLAG: Final = "--run"
_TRAINING: Final = "training"
"""Folder of the checkpoints of unfinished cells, within the run's."""


def run_session(
    spec: RunSpec,
    job: Job,
    folder: Path,
    plan: Sequence[tuple[str, str]],
    work: Callable[[Ledger], Mapping[str, Any]],
    *,
    progress: Progress,
    out: Path | None = None,
) -> dict[str, Any]:
    """Return the summary of a run: of a finished one what it found, else what `work` makes of the ledger.

    Args:
        spec: The run.
        job: Its model and rows.
        folder: The run folder.
        plan: Shown before anything heavy.
        work: Runs the cells and returns the summary without `run` and `seconds`.
        progress: Told what is going on.
        out: Where a model is written; must be free when the run begins.
    """
    if out is not None:
        _require_apart(folder, out)
    if not (folder / "run.json").is_file():
        require_new_folder(folder, flag=FLAG)
        if out is not None:
            require_output(out)
        progress.plan(f"keelwright {spec.command}", plan)
        progress.stage("checking the weights of the model")
        job.party.require_finite()
    with RunFolder.open(folder, spec, flag=FLAG) as keeper:
        done = keeper.finished()
        if done is not None:
            progress.note(f"'{folder}' is finished already; this is its result")
            ensure_report(folder)
            return done
        if out is not None:
            require_free(out, file_digest(folder / "run.json"))
        if keeper.resumed:
            progress.plan(f"keelwright {spec.command}, resumed", plan)
        seconds: dict[str, float] = {}
        with threads_for(job.party.parameters), stopwatch(seconds, "all"):
            ledger = Ledger(job, keeper, job.open(keeper, progress, folder=folder / _TRAINING), [], {}, {})
            found = work(ledger)
        summary = {"schema": 1, "command": spec.command, "run": str(folder), **found, "seconds": seconds}
        keeper.finish(summary)
        shutil.rmtree(folder / _TRAINING, ignore_errors=True)
    write_report(folder)
    return summary


def measured(ledger: Ledger) -> dict[str, Any]:
    """Return the part of a summary that every command has: what was measured, and what it took."""
    return {
        "model": ledger.job.party.ref.text,
        "primary": ledger.job.primary,
        "rows": ledger.rows,
        "cost": ledger.costs,
        "log": ledger.logs,
    }


def spec_of(
    command: str,
    job: Job,
    words: Sequence[str],
    methods: Mapping[str, Sequence[Chosen]],
    files: Mapping[str, str | Path],
    **further: Any,
) -> RunSpec:
    """Return what is written to `run.json`.

    Args:
        command: The command.
        job: Its model, rows and settings.
        words: What the user typed first: method, model and flags of their own.
        methods: What they chose, by kind (`kinds`, `defences`).
        files: Rows by role.
        further: Settings that are not in the job's config.
    """
    chosen = [one for several in methods.values() for one in several]
    told = [f"{one.name}.{key}={json.dumps(value)}" for one in chosen for key, value in one.told().items()]
    typed = ["keelwright", command, *words]
    typed += [word for role, path in files.items() for word in (f"--{'data' if role == 'user' else role}", str(path))]
    typed += [word for one in told for word in ("--set", one)]
    typed += _flags(job.config)
    kinds = {kind: {one.name: one.public() for one in several} for kind, several in methods.items()}
    config = {**config_to_mapping(job.config), **kinds, **further}
    return RunSpec(command, tuple(typed), config, job.config.seed, job.inputs)


def _flags(config: TuningConfig) -> list[str]:
    """Return the options that differ from their defaults, as they are typed."""
    typed: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        flag = "--judge" if field.name == "judges" else f"--{field.name.replace('_', '-')}"
        if value is True:
            typed.append(flag)
        elif field.name == "judges":
            typed += [word for one in value for word in (flag, one)]
        else:
            typed += [flag, ",".join(map(str, value)) if field.name == "at" else str(value)]
    return typed


def _require_apart(folder: Path, out: Path) -> None:
    """Raise `ConfigError` where the run folder and the model's lie in each other: one would overwrite the other."""
    run, model = folder.absolute(), out.absolute()
    if run == model or run in model.parents or model in run.parents:
        raise ConfigError(
            "The run and the model need folders of their own.",
            expected="--run and --out side by side",
            found=f"--run {folder}, --out {out}",
            fix="give one of them another path",
        )
