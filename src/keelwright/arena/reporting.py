# SPDX-License-Identifier: Apache-2.0
"""From a finished run of `stress`, `harden` or `tune` to its `report.html`; needs no torch."""

from __future__ import annotations

from pathlib import Path

from keelwright.core.files import write_atomic
from keelwright.report.tuning import render_tuning
from keelwright.runs.folder import read_run, unfinished
from keelwright.runs.places import disk_errors

COMMANDS = ("stress", "harden", "tune")


def ensure_report(folder: Path) -> None:
    """Render the page of a finished run that was cut off before it had one."""
    if not (folder / "report.html").is_file():
        write_report(folder)


def write_report(folder: Path) -> Path:
    """Render the run's page from its files and return its path."""
    found = read_run(folder)
    if found.summary is None:
        raise unfinished(found)
    page = render_tuning(found.run, found.summary, found.records())
    path = folder / "report.html"
    with disk_errors(path):
        write_atomic(path, page)
    return path
