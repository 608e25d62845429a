# SPDX-License-Identifier: Apache-2.0
"""What a run of `stress`, `harden` or `tune` came to, as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from keelwright.cli.screen import metrics_table, stdout_console

_SIDE_BY_SIDE: Final = 3
"""Models in one table: each metric has its interval, and a screen is about 100 columns wide."""


def show_tuning(summary: Mapping[str, Any]) -> None:
    """Print a summary on stdout: the sentence, the last model of every arm, the gate, and where everything is."""
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
    for rule in (summary.get("gate") or {}).get("rules") or ():
        console.print(f"{rule['outcome']:<14}  {rule['says']}", markup=False, soft_wrap=True)
    for note in summary.get("notes") or ():
        console.print(f"note    {note}", markup=False, soft_wrap=True)
    for name, place in (("model", summary.get("model_out")), ("report", f"{summary['run']}/report.html")):
        if place:
            console.print(f"{name:<7} {place}", markup=False, soft_wrap=True)


def last_models(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the metrics of the start and of the last model of each arm, by a name that says which it is.

    Of several seeds those of the first: the page holds all of them.
    """
    from keelwright.report.tuning_reading import read_tuning

    reading = read_tuning(summary)
    told = f", seed {reading.seeds[0]}" if len(reading.seeds) > 1 else ""
    return {arm.name if arm.is_start else f"{arm.name}{told}": arm.last["metrics"] for arm in reading.arms}
