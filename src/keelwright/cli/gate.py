# SPDX-License-Identifier: Apache-2.0
"""`keelwright gate RUN --policy FILE`: a verdict for continuous integration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keelwright.cli.options import Json
from keelwright.cli.screen import errors_as_exit_codes, print_json
from keelwright.core.errors import ExitCode


def gate(
    run: Annotated[Path, typer.Argument(help="Run folder of audit or compare, or a log of Inspect or lm-eval.")],
    policy: Annotated[str, typer.Option(help="Policy file (YAML), or default.")] = "default",
    against: Annotated[Path | None, typer.Option(help="Run folder or log of the model before.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write JUnit XML here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write a Markdown summary here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder of the verdict; default runs/<time>-gate.")] = None,
    as_json: Json = False,
) -> None:
    """Hold a run to a policy: exit 0 pass, 4 fail, 6 not measurable (and how many items it would take)."""
    with errors_as_exit_codes(as_json=as_json):
        from keelwright.heal.gate import gate as run_gate

        summary = run_gate(run, policy=policy, against=against, out=out, junit_file=junit, markdown_file=markdown)
    if as_json:
        print_json(summary)
    else:
        from keelwright.cli.results import show_result

        show_result(summary)
    codes = {"pass": ExitCode.DONE, "fail": ExitCode.GATE_FAILED, "not measurable": ExitCode.NOT_MEASURABLE}
    raise typer.Exit(int(codes[summary["outcome"]]))
