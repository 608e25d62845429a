# SPDX-License-Identifier: Apache-2.0
"""What a run of `stress`, `harden` or `tune` came to, as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from keelwright.cli.screen import metrics_table, stdout_console

_SIDE_BY_SIDE: Final = 3
"""Models in one table: each metric has its interval, and a screen is about 100 columns wide."""


def show_tuning(summary: Mapping[str, Any]) -> None:
    """Print a summary on stdout: the sentence, the last model of every arm, knee and styles, the gate, where all is."""
    console = stdout_console()
    console.print(f"{summary['sentence']}\n", style="bold", markup=False, soft_wrap=True)
    models = last_models(summary)
    names = list(models)
    for first in range(0, len(names), _SIDE_BY_SIDE):
        shown = {name: models[name] for name in names[first : first + _SIDE_BY_SIDE]}
        table = metrics_table({"models": shown, "utility": summary.get("utility")})
        if table.row_count:
            console.print(table)
            console.print()
    for name, told in _findings(summary):
        console.print(f"{name:<7} {told}", markup=False, soft_wrap=True)
    for rule in (summary.get("gate") or {}).get("rules") or ():
        console.print(f"{rule['outcome']:<14}  {rule['says']}", markup=False, soft_wrap=True)
    for note in summary.get("notes") or ():
        console.print(f"note    {note}", markup=False, soft_wrap=True)
    for name, place in (("model", summary.get("model_out")), ("report", f"{summary['run']}/report.html")):
        if place:
            console.print(f"{name:<7} {place}", markup=False, soft_wrap=True)


def _findings(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a line for the knee of a sweep, and one for the interaction of each style and seed."""
    from keelwright.report.tuning_reading import read_tuning
    from keelwright.report.tuning_tables import knee_words, style_lines

    reading = read_tuning(summary)
    told = knee_words(reading)
    return [*([("knee", told)] if told else []), *(("style", one) for one in style_lines(reading))]


def last_models(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the metrics of the start and of the last model of each arm, by a name that says which it is.

    Of several seeds those of the first: the page holds all of them.
    """
    from keelwright.report.tuning_reading import read_tuning

    reading = read_tuning(summary)
    told = f", seed {reading.seeds[0]}" if len(reading.seeds) > 1 else ""
    return {arm.name if arm.is_start else f"{arm.name}{told}": arm.last["metrics"] for arm in reading.arms}
