# SPDX-License-Identifier: Apache-2.0
"""A user's own set: rows of a file in any supported format, turned into items by a small mapping.

The mapping says which column each field of an item comes from; a value that begins with `=` is the same for every row:
`{"prompt": "question", "kind": "=harmful", "hazard": "category", "facts.region": "region"}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, get_args

from keelwright.core.config import nearest
from keelwright.core.errors import ConfigError
from keelwright.core.records import Item, Kind
from keelwright.data.source_rows import Distinct, SourceRow, read_rows
from keelwright.data.task_file import require_scorer

FIELDS: Final = ("prompt", "kind", "hazard", "id", "system", "expected", "scorer", "cluster", "pair", "licence")
"""What a mapping may name, beside `facts.NAME` and `materials.NAME`."""

_OPEN: Final = ("facts.", "materials.")
_EXAMPLE: Final = '{"prompt": "question", "kind": "=harmful", "hazard": "category"}'


def read_user_set(
    path: Path | str, *, mapping: Mapping[str, str], name: str, kinds: Mapping[str, Kind] | None = None
) -> list[Item]:
    """Read a file of rows as items.

    Args:
        path: CSV, TSV, JSON, JSON lines (each perhaps gzipped) or Parquet.
        mapping: Column by field, or `=` and a constant; `prompt` and `kind` are needed, `expected` for tasks. Without
            `hazard` it is the set's name, without `id` the number of the row's line.
        name: What the set is called; the items' suite.
        kinds: Kinds by what the kind column says, for instance `{"unsafe": "harmful", "safe": "contrast"}`.

    Returns:
        Items in file order.

    Raises:
        ConfigError: The mapping names an unknown field, lacks one, or its constants make no item.
        MissingError: There is no such file, or Parquet needs a package that is not installed.
        DataError: The file or a row is malformed, or an id is repeated.
    """
    _require_mapping(mapping)
    columns = [source for source in mapping.values() if not source.startswith("=")]
    seen = Distinct()
    return [_item(row, mapping, name, kinds or {}, seen) for row in read_rows(path, columns=columns)]


def _require_mapping(mapping: Mapping[str, str]) -> None:
    for field in mapping:
        if field not in FIELDS and not any(field.startswith(stem) and field != stem for stem in _OPEN):
            raise ConfigError(
                f"The mapping names an unknown field '{field}'.",
                expected=f"fields out of {', '.join(FIELDS)}, facts.NAME, materials.NAME",
                found=field,
                fix=nearest(field, FIELDS),
            )
    for field in ("prompt", "kind"):
        if field not in mapping:
            raise ConfigError(
                f"The mapping says nothing of '{field}'.",
                expected=f"a mapping such as {_EXAMPLE}",
                found=f"fields {', '.join(mapping) or 'none'}",
                fix=f"name the column of '{field}', or '=' and what it is for every row",
            )


def _item(row: SourceRow, mapping: Mapping[str, str], name: str, kinds: Mapping[str, Kind], seen: Distinct) -> Item:
    kind = _kind(row, mapping["kind"], kinds)
    expected, scorer = _maybe(row, mapping, "expected"), _maybe(row, mapping, "scorer")
    if kind == "task":
        if expected is None:
            raise row.malformed("a known answer under 'expected', which items of kind task need", "none")
        scorer = scorer or "exact"
        require_scorer(row.where, scorer, expected)
    number = _maybe(row, mapping, "id") or f"{row.number:05d}"
    licence, system = _maybe(row, mapping, "licence"), _maybe(row, mapping, "system")
    cluster, pair = _maybe(row, mapping, "cluster"), _maybe(row, mapping, "pair")
    return Item(
        item_id=seen.add(f"{name}/{number}", row),
        suite=name,
        kind=kind,
        hazard=_maybe(row, mapping, "hazard") or name,
        prompt=mapping["prompt"][1:] if mapping["prompt"].startswith("=") else row.text(mapping["prompt"]),
        system=system,
        expected=expected,
        scorer=scorer,
        cluster_id=f"{name}/{cluster}" if cluster else None,
        pair_id=f"{name}/{pair}" if pair else None,
        licence=licence,
        facts=_open_fields(row, mapping, "facts."),
        materials=_open_fields(row, mapping, "materials."),
    )


def _kind(row: SourceRow, source: str, kinds: Mapping[str, Kind]) -> Kind:
    known: dict[str, Kind] = {**{one: one for one in get_args(Kind)}, **kinds}
    if not source.startswith("="):
        return known[row.choice(tuple(known), source)]
    if source[1:] not in known:
        raise ConfigError(
            f"The mapping gives every row the kind '{source[1:]}', which is none.",
            expected=f"one of {', '.join(known)}",
            found=source,
            fix=nearest(source[1:], known),
        )
    return known[source[1:]]


def _maybe(row: SourceRow, mapping: Mapping[str, str], field: str) -> str | None:
    source = mapping.get(field, "=")
    return (source[1:] if source.startswith("=") else row.maybe(source)) or None


def _open_fields(row: SourceRow, mapping: Mapping[str, str], stem: str) -> dict[str, str]:
    found = {field.removeprefix(stem): _maybe(row, mapping, field) for field in mapping if field.startswith(stem)}
    return {field: text for field, text in found.items() if text is not None}
