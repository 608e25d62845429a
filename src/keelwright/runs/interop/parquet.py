# SPDX-License-Identifier: Apache-2.0
"""Records as a flat Parquet table, and back: for notebooks, databases and data frames.

One row per record. Every field of a record is a column; a judge `J` has the columns `judge.J.label`, `judge.J.score`
and `judge.J.raw`, a fact `F` has `fact.F`, and `judges` names the record's judges in their order, the suite's own
first.

Cost:
    Two passes over the records, one to find the columns; one row group in memory at a time.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from keelwright.core.errors import DataError, MissingError
from keelwright.core.records import Judgement, Record
from keelwright.runs.interop.record_lines import RunRecords
from keelwright.runs.interop.whole_file import written_whole

SCHEMA: Final = 1
"""Version of the table that is written and read."""
ROWS: Final = 5_000
"""Records per row group."""

_KEY: Final = b"keelwright"
_TYPES: Final[Mapping[str, str]] = {
    "item_id": "string", "suite": "string", "suite_digest": "string", "kind": "string", "hazard": "string",
    "prompt": "string", "model_id": "string", "revision": "string", "template_digest": "string",
    "decoding_digest": "string", "output": "string", "n_tokens": "int64", "finish": "string", "seed": "int64",
    "cluster_id": "string", "sample": "int64", "samples": "int64", "max_new_tokens": "int64", "pair_id": "string",
    "licence": "string", "n_prompt_tokens": "int64",
}  # fmt: skip
"""Columns of a record's own fields, and their types; a test holds them against `Record`."""
_PARTS: Final[Mapping[str, str]] = {"label": "string", "score": "float64", "raw": "string"}


def write_parquet(run: Path, path: Path) -> Path:
    """Write the records of a run as one Parquet file.

    Args:
        run: A run folder.
        path: The file; nothing may be there.

    Returns:
        The file.

    Raises:
        MissingError: The extra `data` is not installed.
        DataError: It is no run folder, or a record is damaged.
        StorageError: The file is there already, or cannot be written.
    """
    records = RunRecords(run)
    about = {name: records.run.run.get(name) for name in ("command", "started", "seed", "versions")}
    return write_records(records, path, about=about)


def write_records(records: Iterable[Record], path: Path, *, about: Mapping[str, Any] | None = None) -> Path:
    """Write records as one Parquet file.

    Args:
        records: What can be iterated twice: a sequence, or the records of a run.
        path: The file; nothing may be there.
        about: JSON values that are kept in the file's metadata.

    Returns:
        The file.

    Raises:
        MissingError: The extra `data` is not installed.
        DataError: The records can be iterated only once.
        StorageError: The file is there already, or cannot be written.
    """
    arrow, tables = _arrow()
    if isinstance(records, Iterator):
        raise DataError(
            "Records that can be read only once cannot be written as a table.",
            expected="a sequence of records",
            found=type(records).__name__,
            fix="pass list(records)",
        )
    judges, facts = _columns(records)
    schema = _schema(arrow, judges, facts).with_metadata(
        {_KEY: json.dumps({"schema": SCHEMA, "judges": judges, "facts": facts, "about": about or {}}).encode()}
    )
    with written_whole(path) as stream, tables.ParquetWriter(stream, schema, compression="zstd") as writer:
        for batch in _batches(records, ROWS):
            rows = [_row(record, judges, facts) for record in batch]
            writer.write_table(arrow.Table.from_pylist(rows, schema=schema), row_group_size=ROWS)
    return path


def read_parquet(path: Path) -> Iterator[Record]:
    """Yield the records of a table that `write_parquet` wrote, one row group at a time.

    Raises:
        MissingError: The extra `data` is not installed, or there is no such file.
        DataError: It is no Parquet file, no table of records, or one of another version; or a row is no record.
    """
    arrow, tables = _arrow()
    if not path.is_file():
        raise MissingError(
            f"There is no file '{path}'.",
            expected="a Parquet file",
            found="a folder" if path.is_dir() else "nothing",
            fix="check the path",
        )
    number = 0
    try:
        with tables.ParquetFile(path) as table:
            judges, facts = _described(path, table.schema_arrow.metadata or {})
            for batch in table.iter_batches(batch_size=ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield _record(row, judges, facts)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            f"'{path}' is not a whole Parquet file.",
            expected="a file as `keelwright runs export --to parquet` writes it",
            found=str(error).split("\n", maxsplit=1)[0],
            fix="export the run again",
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"'{path}', row {number}: not a record.",
            expected="the columns of an exported run",
            found=f"{type(error).__name__}: {error}",
            fix="export the run again",
        ) from error


def _columns(records: Iterable[Record]) -> tuple[list[str], list[str]]:
    """Return the judges and the facts that occur, in order of first appearance."""
    judges: dict[str, None] = {}
    facts: dict[str, None] = {}
    for record in records:
        judges.update(dict.fromkeys(record.judgements))
        facts.update(dict.fromkeys(record.facts))
    return list(judges), list(facts)


def _schema(arrow: Any, judges: Sequence[str], facts: Sequence[str]) -> Any:
    fields = [(name, getattr(arrow, kind)()) for name, kind in _TYPES.items()]
    fields.append(("judges", arrow.list_(arrow.string())))
    fields += [(f"judge.{judge}.{part}", getattr(arrow, kind)()) for judge in judges for part, kind in _PARTS.items()]
    fields += [(f"fact.{fact}", arrow.string()) for fact in facts]
    return arrow.schema(fields)


def _row(record: Record, judges: Sequence[str], facts: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(record, name) for name in _TYPES}
    row["judges"] = list(record.judgements)
    for judge in judges:
        opinion = record.judgements.get(judge)
        row |= {f"judge.{judge}.{part}": getattr(opinion, part, None) for part in _PARTS}
    return row | {f"fact.{fact}": record.facts.get(fact) for fact in facts}


def _record(row: Mapping[str, Any], judges: Sequence[str], facts: Sequence[str]) -> Record:
    opinions = {judge: Judgement(**{part: row[f"judge.{judge}.{part}"] for part in _PARTS}) for judge in row["judges"]}
    known = {fact: row[f"fact.{fact}"] for fact in facts if row[f"fact.{fact}"] is not None}
    return Record(**{name: row[name] for name in _TYPES}, judgements=opinions, facts=known)


def _described(path: Path, metadata: Mapping[bytes, bytes]) -> tuple[list[str], list[str]]:
    try:
        about = json.loads(metadata.get(_KEY, b"null"))
        version = about["schema"] if isinstance(about, dict) else None
        found = (list(about["judges"]), list(about["facts"])) if version == SCHEMA else None
    except (ValueError, KeyError, TypeError) as error:
        version, found = f"metadata that cannot be read ({error})", None
    if found is None:
        raise DataError(
            f"'{path}' is not a table of records that can be read.",
            expected=f"version {SCHEMA} of the table that `keelwright runs export --to parquet` writes",
            found="a Parquet file of another program" if version is None else f"version {version}",
            fix="export the run again with this version",
        )
    return found


def _batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    batch: list[Record] = []
    for record in records:
        batch.append(record)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _arrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingError(
            "Parquet files need a package that is not installed.",
            expected="the extra data (pyarrow)",
            found=str(error),
            fix='pip install "keelwright[data]"',
        ) from error
