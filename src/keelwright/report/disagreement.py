# SPDX-License-Identifier: Apache-2.0
"""Where the judges of a run differ: agreement beyond chance for each two of them, and their labels against each other.

*Source*: Cohen 1960 (kappa).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keelwright.core.records import RESPONSE_CLASSES, Estimate, Record
from keelwright.report.examples import LABELS
from keelwright.report.reading import read_estimate
from keelwright.report.tables import Cell, Column, Table
from keelwright.report.text import NOT_MEASURED, interval, number
from keelwright.report.verdicts import UNREADABLE, Panel, judge_name, panel_of


@dataclass(frozen=True, slots=True)
class JudgeTables:
    """One row per pair of judges and model, and the labels of each pair against each other."""

    overview: Table
    labels: tuple[tuple[str, Table], ...]
    """Pairs of title and table."""


def judge_tables(
    records: Sequence[Record], roles: Sequence[tuple[str, str]], summary: Mapping[str, Any]
) -> JudgeTables | None:
    """Return where the judges differ, or None where no record has two of them.

    Args:
        records: Of all models, under the model ids that `roles` names.
        roles: Pairs of model id and title.
        summary: Its `disagreements`, where it has any, give intervals.
    """
    panel = panel_of(records)
    titles = dict(roles)
    own = [record for record in records if record.model_id in titles]
    known = {(str(one["first"]), str(one["second"])): one for one in summary.get("disagreements") or ()}
    overview: list[tuple[Cell, ...]] = []
    labels: list[tuple[str, Table]] = []
    for first, second in itertools.combinations(panel.judges, 2):
        if not panel.is_comparable(first, second):
            continue
        shared = [record for record in own if first in record.judgements and second in record.judgements]
        if not shared:
            continue
        for model_id, title in roles:
            side = [record for record in shared if record.model_id == model_id]
            if side:
                overview.append(_overview_row(panel, first, second, side, title))
        estimate = read_estimate(_kappa_in(known, first, second))
        labels.append((_names(first, second), _label_table(first, second, shared, len(labels), estimate)))
    if not overview:
        return None
    columns = (
        Column("Judges"),
        Column("Model"),
        Column("n", True),
        Column("Differ", True),
        Column("Kappa", True),
        Column("Not readable", True),
    )
    caption = "Each two judges on the same answers, by the classes that both tell apart"
    return JudgeTables(Table("judges", caption, columns, tuple(overview)), tuple(labels))


def _names(first: str, second: str) -> str:
    return f"{judge_name(first)} and {judge_name(second)}"


def _kappa_in(known: Mapping[tuple[str, str], Mapping[str, Any]], first: str, second: str) -> Any:
    found = known.get((first, second)) or known.get((second, first)) or {}
    return found.get("kappa")


def kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Return Cohen's kappa; None without pairs, or where both say the same one thing throughout."""
    n = len(first)
    of_first, of_second = Counter(first), Counter(second)
    by_chance = sum(count * of_second[label] for label, count in of_first.items()) / (n * n) if n else 1.0
    if by_chance == 1.0:
        return None
    agreed = sum(one == two for one, two in zip(first, second, strict=True)) / n
    return (agreed - by_chance) / (1.0 - by_chance)


def _overview_row(panel: Panel, first: str, second: str, side: Sequence[Record], title: str) -> tuple[Cell, ...]:
    with_harm = {first, second} <= panel.tell_harm
    pairs = [
        tuple(panel.view(judge, record.judgements[judge], with_harm=with_harm) for judge in (first, second))
        for record in side
    ]
    readable = [pair for pair in pairs if "unreadable" not in pair]
    differ = sum(one != two for one, two in readable)
    found = kappa([one for one, _ in readable], [two for _, two in readable])
    is_flat = any(len({pair[place] for pair in readable}) < 2 for place in (0, 1))
    unread = [sum(pair[place] == "unreadable" for pair in pairs) for place in (0, 1)]
    share = f"{number(100 * differ / len(readable))}%" if readable else ""
    what = "refusals, harm, no sense" if with_harm else "refusals, no sense"
    return (
        Cell(_names(first, second), what),
        Cell(title),
        Cell(f"{len(readable):,}"),
        Cell(f"{differ:,}", share),
        Cell("not defined" if found is None else number(found), "one of them never varies" if is_flat else ""),
        Cell(f"{unread[0]:,} and {unread[1]:,}"),
    )


def _label_table(first: str, second: str, shared: Sequence[Record], place: int, estimate: Estimate | None) -> Table:
    """Return the labels of two judges against each other, over all models; unreadable ones have a row and a column."""
    counts = Counter((one.judgements[first].label, one.judgements[second].label) for one in shared)
    order = [label for label in RESPONSE_CLASSES if label not in UNREADABLE] + sorted(UNREADABLE)
    across = [label for label in order if any(two == label for _, two in counts)]
    rows = tuple(
        (
            Cell(LABELS[one]),
            *(
                Cell(f"{counts[one, two]:,}", tone="good" if one == two and counts[one, two] else "")  # type: ignore[index]
                for two in across
            ),
        )
        for one in order
        if any(label == one for label, _ in counts)
    )
    readable = [(one, two) for (one, two), n in counts.items() for _ in range(n) if not {one, two} & UNREADABLE]
    found = kappa([one for one, _ in readable], [two for _, two in readable])
    said = f"kappa of the labels {NOT_MEASURED if found is None else number(found)}"
    if estimate is not None:
        said += f" ({interval(estimate.low, estimate.high, 'number')})"
    caption = f"{first} in rows, {second} in columns, all models; {said}"
    columns = (Column(f"{judge_name(first)} says"), *(Column(LABELS[label], True) for label in across))
    return Table(f"labels-{place}", caption, columns, rows)
