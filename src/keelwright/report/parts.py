# SPDX-License-Identifier: Apache-2.0
"""The parts of a suite on the page: what was asked and how, every figure with its interval, the sets, and the cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keelwright.report.reading import read_estimate
from keelwright.report.tables import Cell, Column, Table, estimate_cell
from keelwright.report.text import number, percent, plain, unit_of, words


@dataclass(frozen=True, slots=True)
class PartView:
    """One part: its own words, how it was asked, and its tables."""

    name: str
    says: str
    facts: tuple[tuple[str, str], ...]
    figures: Table | None
    sets: Table | None


def part_views(summary: Mapping[str, Any], roles: Sequence[tuple[str, str]]) -> list[PartView]:
    """Return the parts of an audit's suite; none for runs that do not name them.

    Args:
        summary: Of an audit.
        roles: Pairs of key (`model`, `against`) and title, in the order of the columns.
    """
    figures = figures_by_role(summary)
    parts = (summary.get("suite") or {}).get("parts") or ()
    return [_view(part, figures, roles, place) for place, part in enumerate(parts)]


def figures_by_role(summary: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Return the further figures of each model; empty for runs without any."""
    found = {"model": summary.get("figures") or ()}
    against = summary.get("against")
    return {"against": against.get("figures") or (), **found} if against else found


def metric_titles(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return the titles of the metrics that a suite names beside the headline six."""
    return {str(one["metric"]): str(one["title"]) for one in summary.get("figures") or ()}


def _view(
    part: Mapping[str, Any],
    figures: Mapping[str, Sequence[Mapping[str, Any]]],
    roles: Sequence[tuple[str, str]],
    place: int,
) -> PartView:
    name = str(part["name"])
    facts = [("Items", f"{int(part.get('items') or 0):,}"), ("Judges", plain(part.get("judges") or ()))]
    facts.append(("Decoding", str(part.get("decoding") or "not recorded")))
    facts.append(("Remedy at the prompt", str(part.get("mitigation") or "none")))
    own = {role: [one for one in rows if one["part"] == name] for role, rows in figures.items()}
    return PartView(
        name=name,
        says=str(part.get("says") or ""),
        facts=tuple(facts),
        figures=_figures_table(own, roles, f"figures-{place}"),
        sets=_sets_table(part.get("sets") or (), f"sets-{place}"),
    )


def _figures_table(
    own: Mapping[str, Sequence[Mapping[str, Any]]], roles: Sequence[tuple[str, str]], name: str
) -> Table | None:
    """Return every figure of a part; a metric that one model lacks is not measured there."""
    titled = {str(one["metric"]): one for rows in own.values() for one in rows}
    if not titled:
        return None
    by_metric = {role: {str(one["metric"]): one for one in rows} for role, rows in own.items()}
    rows = []
    for metric, one in titled.items():
        unit = unit_of(one.get("unit"))
        arrow = "higher is better" if one.get("higher_is_better") else "lower is better"
        cells = [
            estimate_cell(read_estimate(by_metric.get(role, {}).get(metric, {}).get("estimate")), unit)
            for role, _ in roles
        ]
        rows.append((Cell(str(one["title"]), f"{one['counts']}; {arrow}"), *cells))
    columns = (Column("Figure"), *(Column(title, True, role) for role, title in roles))
    return Table(name, "Each figure with its 95% interval and its count", columns, tuple(rows))


def _sets_table(sets: Sequence[Mapping[str, Any]], name: str) -> Table | None:
    if not sets:
        return None
    rows = tuple(
        (
            Cell(str(one.get("title") or one["name"]), str(one["name"]) if one.get("title") != one["name"] else ""),
            Cell(f"{int(one['n']):,}"),
            Cell(str(one.get("licence") or "own items")),
            Cell(str(one.get("caution") or "none stated"), tone="" if one.get("caution") else "muted"),
            Cell(str(one.get("digest") or ""), is_code=True),
        )
        for one in sets
    )
    columns = (
        Column("Set"),
        Column("Items", True),
        Column("Licence"),
        Column("What its figures do not mean"),
        Column("Digest"),
    )
    return Table(name, "Data sets, counted before any limit", columns, rows)


def overlaps_table(summary: Mapping[str, Any]) -> Table | None:
    """Return the items that two sets share, or None where none do."""
    found = summary.get("overlaps") or ()
    rows = tuple(
        (
            Cell(" and ".join(str(name) for name in one["sets"])),
            Cell(f"{one['same']:,}"),
            Cell(f"{one['near']:,}"),
            Cell(", ".join(percent(share) for share in one.get("shares") or ())),
        )
        for one in found
    )
    columns = (Column("Sets"), Column("Same", True), Column("Near-duplicates", True), Column("Share of each", True))
    caption = "Items that two sets share count in both: do not read the two as independent evidence"
    return Table("overlaps", caption, columns, rows) if rows else None


_USAGE_WORDS: Mapping[str, str] = {
    "prompt_tokens": "Tokens read",
    "completion_tokens": "Tokens written",
    "uncounted": "Answers without a count",
    "cost": "Cost, in the currency of the prices",
}


def usage_table(summary: Mapping[str, Any], roles: Sequence[tuple[str, str]]) -> Table | None:
    """Return what the engines were asked for and what it cost; None where no engine counts."""
    against = (summary.get("against") or {}).get("usage") or {}
    by_role = {"model": summary.get("usage") or {}, "against": against}
    keys = list(dict.fromkeys(key for role, _ in roles for key in by_role.get(role, {})))
    rows = tuple(
        (
            Cell(_USAGE_WORDS.get(key, words(key))),
            *(Cell(_amount(by_role.get(role, {}).get(key))) for role, _ in roles),
        )
        for key in keys
    )
    columns = (Column("Usage"), *(Column(title, True, role) for role, title in roles))
    return Table("usage", "What was asked of the engines", columns, rows) if rows else None


def _amount(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return number(value) if isinstance(value, float) else plain(value)
