# SPDX-License-Identifier: Apache-2.0
"""`keelwright repair METHOD`: one edit, written out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keelwright.cli.options import Device, Json, Offline, Quiet, Run, Seed, Suite, Utility
from keelwright.cli.screen import ScreenProgress, errors_as_exit_codes, print_json, stdout_console
from keelwright.core.errors import ConfigError


def repair(
    method: Annotated[str, typer.Argument(help="linear or resta; see `keelwright methods`.")],
    aligned: Annotated[str, typer.Option(help="Where safety was good.")],
    tuned: Annotated[str, typer.Option(help="What came of it.")],
    out: Annotated[Path, typer.Option(help="Where the repaired model goes.")],
    unaligned: Annotated[str | None, typer.Option(help="A model whose refusals were tuned away, for resta.")] = None,
    coefficient: Annotated[
        str | None,
        typer.Option(help="A number (linear: 0 aligned to 1 tuned; resta: strength), or auto to search as heal does."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on although the models look unrelated.")] = False,
    allow_template_change: Annotated[
        bool, typer.Option("--allow-template-change", help="Go on although the chat templates differ.")
    ] = False,
    max_shard_gb: Annotated[float, typer.Option(help="Largest output file, GB.")] = 5.0,
    utility: Utility = None,
    no_utility: Annotated[bool, typer.Option("--no-utility", help="With auto: choose by safety alone.")] = False,
    suite: Suite = "auto",
    run: Run = None,
    seed: Seed = 0,
    device: Device = "auto",
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Apply one repair with a given coefficient and write the model. No forward pass, no safety evaluation."""
    if coefficient == "auto":
        from keelwright.cli.heal import heal

        heal(
            aligned, tuned, out, methods=method, utility=utility, no_utility=no_utility, unaligned=unaligned,
            suite=suite, max_shard_gb=max_shard_gb, allow_template_change=allow_template_change, run=run, seed=seed,
            device=device, offline=offline, quiet=quiet, as_json=as_json,
        )  # fmt: skip
    with errors_as_exit_codes(as_json=as_json), ScreenProgress(quiet=quiet) as progress:
        _require_no_search_options(utility, no_utility, suite, run)
        from keelwright.repair.materialise import repair as run_repair

        result = run_repair(
            method,
            aligned=aligned,
            tuned=tuned,
            unaligned=unaligned,
            coefficient=_number(coefficient),
            out=out,
            offline=offline,
            max_shard_bytes=int(max_shard_gb * 1e9),
            force=force,
            allow_template_change=allow_template_change,
            progress=progress,
        )
    if as_json:
        print_json(result)
    else:
        console = stdout_console()
        coefficients = ", ".join(f"{name} {value:g}" for name, value in result["coefficients"].items())
        words = f"{result['out']}: {result['method']} with {coefficients}, safety not evaluated."
        console.print(words, markup=False, soft_wrap=True)
        console.print(f"next: keelwright audit {result['out']} --against {aligned}", markup=False, soft_wrap=True)


def _require_no_search_options(utility: str | None, no_utility: bool, suite: str, run: Path | None) -> None:
    """Refuse what only a search with `--coefficient auto` would use: it must not look as if it had been heeded."""
    given = {"--utility": utility, "--no-utility": no_utility, "--suite": suite != "auto", "--run": run}
    idle = [name for name, value in given.items() if value]
    if idle:
        raise ConfigError(
            f"'{idle[0]}' has no meaning with a given coefficient: nothing is measured.",
            expected="--coefficient auto with it, or neither",
            found=", ".join(idle),
            fix=f"drop {idle[0]}, or write --coefficient auto",
        )


def _number(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            "'--coefficient' is not a number.", expected="a number, or auto", found=text, fix="write for example 0.5"
        ) from None
