# SPDX-License-Identifier: Apache-2.0
"""From a finished run folder to its `report.html`; needs no torch."""

from __future__ import annotations

from pathlib import Path

from keelwright.core.errors import DataError
from keelwright.core.files import write_atomic
from keelwright.report.page import render_audit, render_heal
from keelwright.runs.folder import read_run


def write_report(folder: Path) -> Path:
    """Render the run's page from its files and return its path.

    Raises:
        DataError: The run is unfinished, or of a command that has no page.
    """
    found = read_run(folder)
    if found.summary is None:
        raise DataError(
            f"The run '{folder}' is unfinished.",
            expected="a run with a summary.json",
            found=f"{len(found.records())} records and no summary",
            fix="repeat its command on the same run folder: it resumes",
        )
    render = render_audit if found.summary["command"] == "audit" else render_heal
    path = folder / "report.html"
    write_atomic(path, render(found.run, found.summary, found.records()))
    return path
