# SPDX-License-Identifier: Apache-2.0
"""From a finished run folder to its `report.html`; needs no torch."""

from __future__ import annotations

from pathlib import Path

from keelwright.core.files import write_atomic
from keelwright.report.page import render_audit, render_compare, render_heal
from keelwright.runs.folder import read_run, unfinished
from keelwright.runs.places import disk_errors


def ensure_report(folder: Path) -> None:
    """Render the page of a finished run that was cut off before it had one."""
    if not (folder / "report.html").is_file():
        write_report(folder)


def write_report(folder: Path) -> Path:
    """Render the run's page from its files and return its path.

    Raises:
        DataError: The run is unfinished, or of a command that has no page.
    """
    found = read_run(folder)
    if found.summary is None:
        raise unfinished(found)
    render = {"audit": render_audit, "compare": render_compare}.get(found.summary["command"], render_heal)
    path = folder / "report.html"
    with disk_errors(path):
        write_atomic(path, render(found.run, found.summary, found.records()))
    return path
