# SPDX-License-Identifier: Apache-2.0
"""What a person sees: plan, progress and notes on stderr, the result on stdout, errors with what to do."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from keelwright.core.errors import ExitCode, KeelwrightError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


@contextlib.contextmanager
def errors_as_exit_codes(*, as_json: bool) -> Iterator[None]:
    """Print a `KeelwrightError` and leave with its exit code; leave with 130 on Ctrl-C.

    Notes on the exception say where unfinished work is kept, and are printed below it.
    """
    try:
        yield
    except KeelwrightError as error:
        notes = getattr(error, "__notes__", [])
        if as_json:
            fields = {name: getattr(error, name) for name in ("problem", "expected", "found", "fix")}
            print_json_error(type(error).__name__, error.exit_code, **fields, notes=notes)
        typer.echo("\n".join([f"{type(error).__name__}: {error}", *(f"  {note}" for note in notes)]), err=True)
        raise typer.Exit(int(error.exit_code)) from None
    except KeyboardInterrupt as error:
        notes = getattr(error, "__notes__", [])
        if as_json:
            print_json_error("Interrupted", ExitCode.INTERRUPTED, "Interrupted.", fix="\n".join(notes) or None)
        typer.echo("\n".join(["\nInterrupted.", *notes]), err=True)
        raise typer.Exit(int(ExitCode.INTERRUPTED)) from None


def print_json_error(
    kind: str,
    exit_code: ExitCode,
    problem: str,
    *,
    expected: str | None = None,
    found: str | None = None,
    fix: str | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Print the one document of a command that failed: `{"schema": 1, "error": {...}}`."""
    details = {"problem": problem, "expected": expected, "found": found, "fix": fix, "notes": list(notes)}
    print_json({"schema": 1, "error": {"type": kind, "exit_code": int(exit_code), **details}})


def print_json(document: object) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def stderr_console(*, quiet: bool = False) -> Console:
    """Return a rich console on stderr."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet, highlight=False)


def stdout_console() -> Console:
    """Return a rich console on stdout, at least 100 columns wide when not on a terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 100
    return Console(highlight=False, width=width)


class ScreenProgress:
    """Draws stages on stderr: a live bar with rate and time left on a terminal, one line per stage elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._console = stderr_console(quiet=quiet)
        self._live = self._console.is_terminal and not quiet
        self._bar: Any = None
        self._task: TaskID | None = None
        self._title = ""
        self._unit = ""
        self._total: int | None = None
        self._done = 0
        self._start = 0.0

    def __enter__(self) -> ScreenProgress:
        if self._live:
            from rich import progress as bars

            self._bar = bars.Progress(
                bars.TextColumn("{task.description}", markup=False),
                bars.BarColumn(bar_width=24),
                bars.MofNCompleteColumn(),
                bars.TextColumn("{task.fields[rate]}"),
                bars.TimeRemainingColumn(compact=True),
                console=self._console,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._close_stage()
        if self._bar is not None:
            self._bar.stop()

    def plan(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print what is about to happen, before any model is loaded."""
        self._close_complete_stage()
        self._console.print(f"[bold]{title}[/]")
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self._console.print(f"  {name:<{width}}  {value}", markup=False, soft_wrap=True)
        self._console.print()

    def stage(self, title: str, total: int | None = None, unit: str = "") -> None:
        """Begin a stage; the one before is closed with its count and seconds."""
        self._close_stage()
        self._title, self._unit, self._total = title, unit, total
        self._done, self._start = 0, time.perf_counter()
        if self._bar is not None:
            self._task = self._bar.add_task(title, total=total, rate="")

    def advance(self, count: int = 1) -> None:
        """Count finished units."""
        self._done += count
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=count, rate=self._rate())

    def note(self, text: str) -> None:
        """Print one line that stays; a stage that is complete is closed first, so that lines come in order."""
        self._close_complete_stage()
        self._console.print(f"  {text}", markup=False, soft_wrap=True)

    def result(self, text: str) -> None:
        """Print one line in place of the current stage's; without seconds where no stage was begun for it."""
        seconds = f"  ({time.perf_counter() - self._start:.1f} s)" if self._title else ""
        self._end_stage()
        self._console.print(f"  {text}{seconds}", markup=False, soft_wrap=True)

    def _close_complete_stage(self) -> None:
        if self._done and self._done == self._total:
            self._close_stage()

    def _rate(self) -> str:
        seconds = time.perf_counter() - self._start
        return f"{self._done / seconds:,.0f} {self._unit}/s" if self._unit and seconds > 0 else ""

    def _close_stage(self) -> None:
        if not self._title:
            return
        seconds = time.perf_counter() - self._start
        count = f"{self._done:,} {self._unit}, " if self._done and self._unit else ""
        line = f"  {self._title}  ({count}{seconds:.1f} s)"
        self._end_stage()
        self._console.print(line, markup=False, soft_wrap=True)

    def _end_stage(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
        self._task, self._title, self._done, self._total = None, "", 0, None


def estimate_text(estimate: Mapping[str, Any] | None, *, as_ratio: bool = False) -> str:
    """Return `64.0% [58.1, 69.5]`, `not measured`, or for a ratio of perplexities `0.981 [0.970, 0.992]`."""
    if estimate is None:
        return "not measured"
    from keelwright.report.text import number

    scale, sign = (1.0, "") if as_ratio else (100.0, "%")
    value, low, high = (number(scale * float(estimate[key])) for key in ("value", "low", "high"))
    return f"{value}{sign} [{low}, {high}]"


METRIC_NAMES = {
    "harm_rate": "harm rate (lower is better)",
    "refusal_rate": "refusals of harmful requests",
    "over_refusal": "over-refusal of look-alikes",
    "answer_rate": "ordinary requests answered",
    "incoherent": "incoherent answers",
    "utility": "utility",
}


def metrics_table(summary: Mapping[str, Any]) -> Any:
    """Return a rich table of a summary: one column per model, one row per metric, each with its interval."""
    from rich.table import Table

    columns: Mapping[str, Mapping[str, Any] | None] = summary["models"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    utility = summary.get("utility") or {}
    for metric, words in METRIC_NAMES.items():
        is_utility = metric == "utility"
        as_ratio = is_utility and utility.get("scorer") == "perplexity"
        cells = [estimate_text(column[metric], as_ratio=as_ratio) if column else "-" for column in columns.values()]
        if any(cell not in ("-", "not measured") for cell in cells):
            table.add_row(f"utility ({utility['name']})" if is_utility and utility else words, *cells)
    return table


def figures_table(summary: Mapping[str, Any]) -> Any:
    """Return a rich table of the further figures of a suite: one column per model, one row per metric and part."""
    from rich.table import Table

    sides = {"against": summary["against"]["figures"]} if "against" in summary else {}
    sides["model"] = summary["figures"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in sides:
        table.add_column(name, justify="right", no_wrap=True)
    several = len({one["part"] for one in summary["figures"]}) > 1
    for row in zip(*sides.values(), strict=True):
        first = row[0]
        words = f"{first['part']}: {first['title']}" if several else first["title"]
        plain = first["unit"] in {"score", "ratio"}
        cells = [estimate_text(one["estimate"], as_ratio=plain) for one in row]
        if first["unit"] == "difference":
            cells = [cell.replace("%", " points") for cell in cells]
        table.add_row(words, *cells)
    return table
