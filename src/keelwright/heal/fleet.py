# SPDX-License-Identifier: Apache-2.0
"""Many models in one command: each is an audit with a run folder of its own, in processes or on Ray.

The folder of the fleet holds one folder per model and a summary over them. A model that cannot be audited does not stop
the others, not even when its process dies; the same command resumes, and finished models are not asked again.

Limits: processes are begun afresh, so a script that calls `audit_fleet` does so under `if __name__ == "__main__":`.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final

from keelwright.core.config import config_from_mapping, config_to_mapping, require_choice, require_in_range
from keelwright.core.errors import ConfigError, KeelwrightError
from keelwright.core.protocols import Progress, Silent
from keelwright.core.ray_session import ray_session
from keelwright.heal.validation import require_labels
from keelwright.measure.audit_config import AuditConfig
from keelwright.measure.panel import panel_of
from keelwright.measure.suites.loading import read_suite
from keelwright.runs.folder import RunFolder, RunSpec, default_run_folder
from keelwright.runs.places import require_place

EXECUTORS: Final = ("processes", "ray")
_FLAG: Final = "--out"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one model could not be audited."""

    model: str
    error: str
    """Name of the error's class."""
    exit_code: int
    text: str


def audit_fleet(
    models: Sequence[str],
    *,
    against: str | None = None,
    run: str | Path | None = None,
    workers: int | None = None,
    executor: str = "processes",
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Audit several models with the same settings, each in a folder of its own.

    Args:
        models: Model references; all different.
        against: Compare each with this model.
        run: Folder of the fleet; `runs/<time>-audits` by default.
        workers: Audits at once; None takes one per processor, at most one per model.
        executor: `processes` of this machine, or `ray`.
        progress: Told of each finished model.
        settings: Fields of `AuditConfig`.

    Returns:
        `{"models": {name: summary of the audit}, "failed": [...], ...}`, as `summary.json` holds it.

    Raises:
        ConfigError: A model is named twice, or a setting is wrong.
        MissingError: Ray is asked for and not installed.
    """
    config = config_from_mapping(AuditConfig, settings, where="audit")
    require_choice("executor", executor, EXECUTORS)
    repeated = sorted({one for one in models if list(models).count(one) > 1})
    if repeated:
        raise ConfigError(
            "A model is named twice.", expected="different models", found=", ".join(repeated), fix="name each once"
        )
    if not models:
        raise ConfigError("No model was named.", expected="at least one", found="none", fix="name the models to audit")
    if workers is not None:
        require_in_range("workers", workers, low=1)
    count = min(len(models), workers or os.cpu_count() or 1)
    progress = progress or Silent()
    _require_known(config, progress)
    folder = Path(run) if run is not None else default_run_folder("audits")
    require_place(folder, flag=_FLAG)
    places = {model: folder / f"{number:02d}-{_slug(model)}" for number, model in enumerate(models, 1)}
    jobs = [(model, against, str(place), config_to_mapping(config)) for model, place in places.items()]
    with RunFolder.open(folder, _spec(models, against, config), flag=_FLAG) as keeper:
        done = keeper.finished()
        if done is not None and not done["failed"]:
            progress.note(f"'{folder}' is finished already; this is its result")
            return done
        progress.plan("keelwright audit", _plan(models, against, count, executor, folder))
        progress.stage(f"auditing on {count} {executor}", len(models), "models")
        found: dict[str, Mapping[str, Any]] = {}
        for model, outcome in (_on_ray if executor == "ray" else _on_processes)(jobs, count):
            found[model] = outcome
            progress.advance()
            progress.note(str(outcome.get("sentence") or f"{model}: {outcome['failure']['text'].splitlines()[0]}"))
        summary = _summary(folder, {model: found[model] for model in models})
        keeper.finish(summary)
    return summary


def _require_known(config: AuditConfig, progress: Progress) -> None:
    """Raise once for what would be wrong with every audit: suites, judges and labels by name."""
    if config.suite != "auto":
        read_suite(config.suite)
    find = panel_of(config, progress)
    for name in config.judges:
        find(name)
    require_labels(config.validate_judge, has_records=True)


Job = tuple[str, str | None, str, Mapping[str, Any]]
"""Model, reference, run folder, settings: what `audit_job` takes."""


def audit_job(model: str, against: str | None, place: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Audit one model in this process and return its summary, or its failure as plain values."""
    import torch

    from keelwright.heal.audit import audit

    torch.set_num_threads(1)
    try:
        return audit(model, against=against, run=place, **settings)
    except KeelwrightError as error:
        return _failure(model, type(error).__name__, int(error.exit_code), str(error))


def _failure(model: str, error: str, exit_code: int, text: str) -> dict[str, Any]:
    failure = Failure(model, error, exit_code, text)
    return {"failure": {name: getattr(failure, name) for name in failure.__slots__}}


def _on_processes(jobs: Sequence[Job], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield outcomes as they come, from a process for each model: what one of them does ends no other."""
    # Begun afresh: a fork of a process with torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    waiting = list(jobs)
    running: dict[connection.Connection, tuple[BaseProcess, str]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                begun = context.Process(target=_work, args=(sender, job), name=f"audit of {job[0]}")
                begun.start()
                sender.close()
                running[receiver] = (begun, job[0])
            for ready in connection.wait(list(running)):
                if isinstance(ready, connection.Connection):
                    process, model = running.pop(ready)
                    yield model, _received(ready, process, model)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _work(sender: connection.Connection, job: Job) -> None:
    """Do one job in a process of its own and send the outcome."""
    # Ctrl-C ends a worker at once: its records are on the disk as they are made, and the parent tells the user.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender.send(audit_job(*job))


def _end_with_parent() -> None:
    """End this process when its parent is gone, however that ended: no worker goes on by itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _received(receiver: connection.Connection, process: BaseProcess, model: str) -> dict[str, Any]:
    """Return what a worker sent, or why it could not."""
    try:
        outcome: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == 1:
            return _failure(model, "Bug", 1, "The audit failed by a bug of keelwright: its traceback stands above.")
        how = f"signal {-process.exitcode}" if process.exitcode and process.exitcode < 0 else f"{process.exitcode}"
        text = f"Its process died ({how}), perhaps for want of memory; run the same command again: it resumes."
        return _failure(model, "ResourceError", 3, text)
    process.join()
    return outcome


def _on_ray(jobs: Sequence[Job], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    with ray_session(workers) as ray:
        remote = ray.remote(num_cpus=1, max_retries=2)(audit_job)
        waiting = {remote.remote(*job): job[0] for job in jobs}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            for reference in done:
                model = waiting.pop(reference)
                try:
                    outcome = ray.get(reference)
                except ray.exceptions.RayError as error:
                    outcome = _failure(model, type(error).__name__, 1, str(error).strip())
                yield model, outcome


def _summary(folder: Path, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    done = {model: one for model, one in found.items() if "failure" not in one}
    failed = [one["failure"] for one in found.values() if "failure" in one]
    tail = f"; {len(failed)} could not be audited" if failed else ""
    return {
        "schema": 1,
        "command": "audits",
        "run": str(folder),
        "sentence": f"{len(done)} of {len(found)} models audited{tail}.",
        "models": {model: one["metrics"] for model, one in done.items()},
        "audits": {
            model: {"run": one["run"], "sentence": one["sentence"], "figures": one["figures"]}
            for model, one in done.items()
        },
        "failed": failed,
    }


def _spec(models: Sequence[str], against: str | None, config: AuditConfig) -> RunSpec:
    inputs = {f"model {number}": {"ref": model, "digest": "see its own run"} for number, model in enumerate(models, 1)}
    words = ["keelwright", "audit", *models, "--suite", config.suite]
    if against is not None:
        inputs["against"] = {"ref": against, "digest": "see the runs"}
        words += ["--against", against]
    return RunSpec("audits", tuple(words), config_to_mapping(config), config.seed, inputs)


def _plan(
    models: Sequence[str], against: str | None, workers: int, executor: str, folder: Path
) -> list[tuple[str, str]]:
    rows = [(f"model {number}", model) for number, model in enumerate(models, 1)]
    rows += [("against", against)] if against is not None else []
    return [*rows, ("workers", f"{workers} {executor}"), ("writes", f"one run folder per model in {folder}")]


def _slug(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")[-60:] or "model"
