# SPDX-License-Identifier: Apache-2.0
"""`keelwright compare RUN_A RUN_B`: the paired change between two audits of the same items."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keelwright.cli.options import Json
from keelwright.cli.screen import errors_as_exit_codes, print_json


def compare(
    run_a: Annotated[Path, typer.Argument(help="Run folder of the audit before, or a log of Inspect or lm-eval.")],
    run_b: Annotated[Path, typer.Argument(help="Run folder of the audit after, or a log.")],
    metric: Annotated[list[str] | None, typer.Option(help="Compare this metric; repeat for several.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="A condition that may differ: judge, decoding, mitigation, k, ...")
    ] = None,
    scorer: Annotated[str | None, typer.Option(help="Of logs: the scorer that decides.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<time>-compare.")] = None,
    as_json: Json = False,
) -> None:
    """Print the paired change B - A per metric, with interval, exact test and what could have been detected."""
    with errors_as_exit_codes(as_json=as_json):
        from keelwright.heal.compare import compare as run_compare

        summary = run_compare(run_a, run_b, run=out, metrics=metric or (), allow=allow or (), scorer=scorer)
    if as_json:
        print_json(summary)
    else:
        from keelwright.cli.results import show_result

        show_result(summary)
