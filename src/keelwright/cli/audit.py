# SPDX-License-Identifier: Apache-2.0
"""`keelwright audit`: records, estimates and a report of one model, or of the change between two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from keelwright.cli.options import BatchSize, Device, Json, Limit, Offline, Quiet, Seed, Suites, Utility
from keelwright.cli.screen import (
    ScreenProgress,
    errors_as_exit_codes,
    figures_table,
    metrics_table,
    print_json,
    stdout_console,
)


def audit(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Hub id[@revision], folder, FOLDER+ADAPTER, lab:NAME, or a name at a server; several: one run each.",
        ),
    ],
    against: Annotated[str | None, typer.Option(help="Compare with this model on the same items.")] = None,
    suite: Suites = "auto",
    judges: Annotated[
        list[str] | None,
        typer.Option("--judge", help="A judge beside the suite's: NAME, NAME:MODEL or NAME:openai:MODEL."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder of data sets, or hub; default $KEELWRIGHT_DATA.")] = None,
    mitigation: Annotated[str | None, typer.Option(help="A remedy at the prompt: cot, guard-prompt, restate.")] = None,
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
    with errors_as_exit_codes(as_json=as_json), ScreenProgress(quiet=quiet) as progress:
        settings: dict[str, Any] = {
            "suite": suite,
            "judges": tuple(judges or ()),
            "data": data,
            "mitigation": mitigation,
            "utility": utility,
            "limit": limit,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "check_batches": check_batches,
            "engine": engine,
            "base_url": base_url,
            "api_key_env": api_key_env,
            "concurrency": concurrency,
            "requests_per_minute": requests_per_minute,
            "price_in": price_in,
            "price_out": price_out,
            "judge_url": judge_url,
            "cache": cache,
            "allow_pickle": allow_pickle,
            "seed": seed,
            "device": device,
            "offline": offline,
        }
        shared: dict[str, Any] = {"against": against, "run": out, "progress": progress, **settings}
        if len(models) == 1:
            from keelwright.heal.audit import audit as run_audit

            summary = run_audit(models[0], **shared)
        else:
            from keelwright.heal.fleet import audit_fleet

            summary = audit_fleet(models, workers=workers, executor=executor, **shared)
    if as_json:
        print_json(summary)
    elif len(models) > 1:
        _show_fleet(summary)
    else:
        _show(summary)
    if summary.get("failed"):
        raise typer.Exit(max(one["exit_code"] for one in summary["failed"]))


def _show(summary: Mapping[str, Any]) -> None:
    console = stdout_console()
    console.print(f"{summary['sentence']}\n", style="bold", markup=False, soft_wrap=True)
    console.print(metrics_table(summary))
    if summary["figures"]:
        console.print(figures_table(summary))
    console.print(f"report  {summary['run']}/report.html", markup=False, soft_wrap=True)


def _show_fleet(summary: Mapping[str, Any]) -> None:
    console = stdout_console()
    console.print(f"{summary['sentence']}\n", style="bold", markup=False, soft_wrap=True)
    console.print(metrics_table(summary))
    for one in summary["audits"].values():
        console.print(f"report  {one['run']}/report.html", markup=False, soft_wrap=True)
    for one in summary["failed"]:
        console.print(f"\n{one['model']}: {one['error']}: {one['text']}", markup=False, soft_wrap=True)
