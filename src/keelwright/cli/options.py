# SPDX-License-Identifier: Apache-2.0
"""The options that every command shares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No plan, no progress; only the result.")]
Seed = Annotated[int, typer.Option(help="Every random stream of the run derives from it.", min=0)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the hub; use what is on this machine.")]
Run = Annotated[Path | None, typer.Option("--run", help="Run folder; repeat the command on it to resume.")]
Suite = Annotated[str, typer.Option(help="Test items: core, workshop, or auto (workshop for lab: models, else core).")]
Suites = Annotated[
    str,
    typer.Option(
        help="core, workshop, over-refusal, harm, qi, toxicity, user-specific, code-robustness, utility, a YAML file, "
        "or several with commas; auto: workshop for lab: models, else core."
    ),
]
Limit = Annotated[int | None, typer.Option(help="Use at most this many items of each kind.", min=2)]
BatchSize = Annotated[int, typer.Option(help="Answers generated at once; halved when memory runs out.", min=1)]
Utility = Annotated[
    str | None,
    typer.Option(help="What the tuning was for: a task file (.jsonl: prompt, answer), a text file, or lab:mood."),
]
