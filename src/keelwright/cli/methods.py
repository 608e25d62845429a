# SPDX-License-Identifier: Apache-2.0
"""`keelwright methods`: what is in the house, from the catalogues alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final

import typer

from keelwright.cli.options import Json
from keelwright.cli.screen import errors_as_exit_codes, print_json
from keelwright.core.config import nearest
from keelwright.core.errors import ConfigError

Rows = Sequence[Mapping[str, Any]]

_HEADINGS: Final = {"passes_per_step": "passes/step"}
_BLANK_AT_ZERO: Final = frozenset({"passes_per_step"})
"""Columns in which zero means that the figure does not apply: weight arithmetic has no steps."""


def methods(
    name: Annotated[str | None, typer.Argument(help="Show one of them.")] = None,
    room: Annotated[str | None, typer.Option(help="Only methods of this room: harden, stress, repair, ...")] = None,
    judges: Annotated[bool, typer.Option("--judges", help="List judges instead.")] = False,
    suites: Annotated[bool, typer.Option("--suites", help="List suites instead.")] = False,
    sets: Annotated[bool, typer.Option("--sets", help="List data sets instead.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="List metrics instead.")] = False,
    as_json: Json = False,
) -> None:
    """List every method with its room, status, passes per step, needs and source; or judges, suites, sets, metrics."""
    with errors_as_exit_codes(as_json=as_json):
        asked = {"judge": judges, "suite": suites, "data set": sets, "metric": metrics}
        kinds = [kind for kind, wanted in asked.items() if wanted]
        if len(kinds) > 1:
            raise ConfigError(
                "Several lists were asked for.",
                expected="one of --judges, --suites, --sets, --metrics",
                found=f"{len(kinds)} of them",
                fix="ask for one at a time",
            )
        if room is not None and kinds:
            raise ConfigError(
                f"'--room' has no meaning for a list of {kinds[0]}s.",
                expected="--room with methods",
                found=f"--room {room}",
                fix="drop --room",
            )
        read, columns = _LISTS[kinds[0] if kinds else "method"]
        if kinds:
            rows = _named(read(), name, kinds[0]) if name else read()
        else:
            rows = _method(name, room) if name else _methods_of(room)
        if as_json:
            print_json(rows)
            return
        _show(rows, columns, title=bool(name))


def _show(rows: Rows, columns: Sequence[str], *, title: bool) -> None:
    from rich.table import Table

    from keelwright.cli.screen import stdout_console

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for position, column in enumerate(columns):
        is_number = column in _BLANK_AT_ZERO
        heading = _HEADINGS.get(column, column.replace("_", " "))
        table.add_column(heading, no_wrap=position < len(columns) - 1, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(
            *("" if column in _BLANK_AT_ZERO and not row[column] else _cell(row[column]) for column in columns)
        )
    console = stdout_console()
    console.print(table)
    if title and rows[0].get("title"):
        console.print(f"\n{rows[0]['title']}.", markup=False)


def _cell(value: Any) -> Any:
    from rich.text import Text

    words = {True: "yes", False: "no", None: ""}
    if value is None or isinstance(value, bool):
        return Text(words[value])
    if isinstance(value, float):
        return Text(f"{value:g}")
    return Text(", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))


def _methods() -> Rows:
    from keelwright.core.catalogue import catalogue

    return [line.to_mapping() for line in catalogue().values()]


def _methods_of(room: str | None) -> Rows:
    """Return the methods of one room, or of all."""
    rows = _methods()
    rooms = list(dict.fromkeys(str(row["room"]) for row in rows))
    if room is not None and room not in rooms:
        raise ConfigError(
            f"There is no room '{room}' with methods.",
            expected=f"one of {', '.join(rooms)}",
            found=room,
            fix=nearest(room, rooms),
        )
    return [row for row in rows if room in (None, row["room"])]


def _method(name: str, room: str | None) -> Rows:
    from keelwright.core.catalogue import find_method

    return [find_method(name, room=room).to_mapping()]


def _judges() -> Rows:
    from keelwright.judges.registry import judge_table
    from keelwright.measure.panel import TASK_JUDGE

    return judge_table((TASK_JUDGE,))


def _suites() -> Rows:
    from keelwright.measure.suites.loading import BUILT_IN, read_suite, suite_names

    found = []
    for name in suite_names():
        spec = read_suite(name)
        says = spec.says or _says(name)
        judges = list(dict.fromkeys(one for part in spec.parts for one in part.judges)) if name not in BUILT_IN else []
        sets = list(dict.fromkeys(one for part in spec.parts for one in part.sets))
        found.append({"name": name, "sets": sets, "judges": judges or ["its own"], "says": says})
    return found


def _says(name: str) -> str:
    from keelwright.measure.suites import find_suite

    return find_suite(name).says


def _sets() -> Rows:
    from keelwright.data.sets.catalogue import SETS

    return [
        {
            "name": one.name,
            "title": one.title,
            "licence": one.licence,
            "hub": one.hub,
            "holds": one.holds,
            "caution": one.caution,
            "citation": one.citation,
        }
        for one in SETS.values()
    ]


def _metrics() -> Rows:
    from keelwright.measure.metric_table import METRIC_NAMES, find_metric

    found = []
    for name in METRIC_NAMES:
        metric = find_metric(name.removesuffix("_K") + "_1" if name.endswith("_K") else name)
        better = "higher" if metric.higher_is_better else "lower"
        found.append({"name": name, "unit": metric.unit, "better": better, "counts": metric.counts})
    return found


def _named(rows: Rows, name: str, kind: str) -> Rows:
    found = [row for row in rows if row["name"] == name]
    if not found:
        names = [str(row["name"]) for row in rows]
        raise ConfigError(
            f"There is no {kind} '{name}'.",
            expected=f"one of {', '.join(names)}",
            found=name,
            fix=nearest(name, names),
        )
    return found


_LISTS: Final[Mapping[str, tuple[Callable[[], Rows], tuple[str, ...]]]] = {
    "method": (_methods, ("name", "room", "status", "passes_per_step", "needs", "source")),
    "judge": (_judges, ("name", "knows_harm", "needs", "says")),
    "suite": (_suites, ("name", "sets", "says")),
    "data set": (_sets, ("name", "licence", "holds")),
    "metric": (_metrics, ("name", "unit", "better", "counts")),
}
"""By what is listed: where its rows come from, and the columns that a table shows."""
