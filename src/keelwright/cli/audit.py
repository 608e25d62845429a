# SPDX-License-Identifier: Apache-2.0
"""`keelwright audit`: records, estimates and a report of one model, or of the change between two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from keelwright.cli.options import BatchSize, Device, Json, Limit, Offline, Quiet, Seed, Suites, Utility
from keelwright.cli.screen import ScreenProgress, errors_as_exit_codes, print_json
from keelwright.core.errors import ConfigError


def audit(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Hub id[@revision], folder, FOLDER+ADAPTER, lab:NAME, or a name at a server; several: one run each.",
        ),
    ] = None,
    against: Annotated[str | None, typer.Option(help="Compare with this model on the same items.")] = None,
    suite: Suites = "auto",
    judges: Annotated[
        list[str] | None,
        typer.Option("--judge", help="A judge beside the suite's: NAME, NAME:MODEL or NAME:openai:MODEL."),
    ] = None,
    validate_judge: Annotated[
        list[str] | None,
        typer.Option(help="Hold the judges against this file of people's labels; without a MODEL only that."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder of data sets, or hub; default $KEELWRIGHT_DATA.")] = None,
    mitigation: Annotated[
        str | None, typer.Option(help="A remedy at the prompt: cot, task-guard or restated-task.")
    ] = None,
    utility: Utility = None,
    limit: Limit = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer in tokens; default: the suite's.", min=1)
    ] = None,
    batch_size: BatchSize = 64,
    check_batches: Annotated[int, typer.Option(help="Make so many answers again, one at a time.", min=0)] = 0,
    engine: Annotated[str, typer.Option(help="hf (here), openai (a server) or vllm.")] = "hf",
    base_url: Annotated[str | None, typer.Option(help="The server, e.g. http://localhost:8000/v1.")] = None,
    api_key_env: Annotated[str, typer.Option(help="Environment variable with the server's key.")] = "OPENAI_API_KEY",
    concurrency: Annotated[int, typer.Option(help="Requests on their way at once.", min=1)] = 8,
    requests_per_minute: Annotated[float | None, typer.Option(help="Most requests in a minute.")] = None,
    price_in: Annotated[float | None, typer.Option(help="Price of a million tokens read.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Price of a million tokens written.")] = None,
    judge_url: Annotated[str | None, typer.Option(help="The server of judges named NAME:openai:MODEL.")] = None,
    cache: Annotated[str | None, typer.Option(help="File of verdicts that audits share (SQLite).")] = None,
    workers: Annotated[int | None, typer.Option(help="Of several models: audits at once.", min=1)] = None,
    executor: Annotated[str, typer.Option(help="Of several models: processes or ray.")] = "processes",
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
    given = dict(locals())
    with errors_as_exit_codes(as_json=as_json), ScreenProgress(quiet=quiet) as progress:
        from keelwright.measure.audit_config import AuditConfig

        settings = {name: given[name] for name in AuditConfig.__slots__ if name not in {"judges", "validate_judge"}}
        shared: dict[str, Any] = {"run": out, "progress": progress, "judges": tuple(judges or ()), **settings}
        labels = tuple(validate_judge or ())
        summary = _run(models or [], against, labels, workers=workers, executor=executor, shared=shared)
    if as_json:
        print_json(summary)
    else:
        from keelwright.cli.results import show_result

        show_result(summary)
    if summary.get("failed"):
        raise typer.Exit(max(one["exit_code"] for one in summary["failed"]))


def _run(
    models: list[str],
    against: str | None,
    labels: tuple[str, ...],
    *,
    workers: int | None,
    executor: str,
    shared: dict[str, Any],
) -> dict[str, Any]:
    """Audit one model or several, or hold judges against labels where no model is named."""
    if not models:
        if not labels or against is not None:
            raise ConfigError(
                "No model was named.",
                expected="keelwright audit MODEL, or --validate-judge LABELS without --against",
                found="no MODEL" if against is None else f"--against {against} and no MODEL",
                fix="name the model to audit",
            )
        from keelwright.heal.validation import validate_judges

        return validate_judges(labels, **shared)
    if len(models) == 1:
        from keelwright.heal.audit import audit as run_audit

        return run_audit(models[0], against=against, validate_judge=labels, **shared)
    from keelwright.heal.fleet import audit_fleet

    return audit_fleet(models, against=against, workers=workers, executor=executor, validate_judge=labels, **shared)
