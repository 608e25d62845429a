# SPDX-License-Identifier: Apache-2.0
"""Rows of files that others wrote: CSV, TSV, JSON, JSON lines (each also gzipped) and Parquet.

Every row knows where it stands, so that whatever is wrong with it is named by file and line. Nothing is skipped, cut or
guessed: text is UTF-8 (with or without a byte-order mark), quotes are closed, every row has every column of the header.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keelwright.core.config import nearest
from keelwright.core.errors import DataError, MissingError

FORMATS: Final = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
"""What a file name may end in; all but Parquet also with `.gz` after it."""

_UTF_16: Final = (b"\xff\xfe", b"\xfe\xff")
_SHOWN: Final = 60
_FLAGS: Final = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a file, with its place in it."""

    values: Mapping[str, Any]
    file: str
    number: int
    unit: str = "line"
    """What `number` counts from 1: `line` of a text file, `entry` of a JSON list, `row` of a Parquet file."""

    @property
    def where(self) -> str:
        """File and place, for error texts."""
        return f"{self.file} {self.unit} {self.number}"

    def text(self, *names: str) -> str:
        """Return the text in the first of the columns `names` that the row has, as the file gives it.

        Raises:
            DataError: There is no such column, or no text in it.
        """
        value = self._value(names)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = f"{value}"
        if not isinstance(value, str) or not value.strip():
            raise self.malformed(f"a text under '{names[0]}'", _shown(value))
        return value

    def maybe(self, *names: str) -> str:
        """Return the text of a column that may be empty or absent, stripped; then the empty text."""
        for name in names:
            value = self.values.get(name)
            if value is not None:
                return f"{value}".strip()
        return ""

    def choice(self, choices: Sequence[str], *names: str) -> str:
        """Return the stripped text of a column that holds one of `choices`.

        Raises:
            DataError: It holds something else.
        """
        text = self.text(*names).strip()
        if text not in choices:
            raise DataError(
                f"{self.where}: '{text}' is not known under '{names[0]}'.",
                expected=f"one of {', '.join(choices)}",
                found=text,
                fix=nearest(text, choices),
            )
        return text

    def integer(self, *names: str) -> int:
        """Return the whole number of a column.

        Raises:
            DataError: It holds something else.
        """
        value = self._value(names)
        try:
            if isinstance(value, (bool, float)):
                raise ValueError
            return int(value)
        except (TypeError, ValueError):
            raise self.malformed(f"a whole number under '{names[0]}'", _shown(value)) from None

    def flag(self, *names: str) -> bool:
        """Return the truth value of a column: true or false, yes or no, 1 or 0.

        Raises:
            DataError: It holds something else.
        """
        value = self._value(names)
        if isinstance(value, bool):
            return value
        found = _FLAGS.get(f"{value}".strip().lower())
        if found is None:
            raise self.malformed(f"true or false under '{names[0]}'", _shown(value))
        return found

    def texts(self, *names: str) -> list[str]:
        """Return the list of texts of a column; a missing list counts as empty.

        Raises:
            DataError: It holds something else.
        """
        value = self._value(names)
        if value is None:
            return []
        if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(one, str) for one in value):
            raise self.malformed(f"a list of texts under '{names[0]}'", _shown(value))
        return list(value)

    def part(self, name: str) -> SourceRow:
        """Return the object that a column holds, as a row at the same place.

        Raises:
            DataError: It holds something else.
        """
        value = self._value((name,))
        if not isinstance(value, Mapping):
            raise self.malformed(f"an object under '{name}'", _shown(value))
        return SourceRow(value, self.file, self.number, self.unit)

    def malformed(self, expected: str, found: str) -> DataError:
        """Return the error of a row that does not hold what it should."""
        return DataError(f"{self.where} is malformed.", expected=expected, found=found, fix="mend the row or remove it")

    def _value(self, names: Sequence[str]) -> Any:
        for name in names:
            if name in self.values:
                return self.values[name]
        raise DataError(
            f"{self.where} has no column '{names[0]}'.",
            expected=" or ".join(f"'{name}'" for name in names),
            found=f"columns {', '.join(self.values) or 'none'}",
            fix=nearest(names[0], self.values) if self.values else "give the row its columns",
        )


class Distinct:
    """Remembers where each id was, so that a second one is named with the first."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}

    def add(self, name: str, row: SourceRow) -> str:
        """Return the id, or complain that it was there before.

        Raises:
            DataError: The id was added before.
        """
        if name in self._places:
            raise DataError(
                f"{row.where} has the id '{name}' a second time.",
                expected="a different id in every row",
                found=f"the same id in {self._places[name]}",
                fix="remove one of the two rows, or give it another id",
            )
        self._places[name] = row.where
        return name


def read_rows(path: Path | str, *, columns: Sequence[str] = ()) -> list[SourceRow]:
    """Read every row of a file; its name says the format.

    Args:
        path: A file whose name ends in one of `FORMATS`, all but Parquet also gzipped (`.gz`). A `.json` file holds a
            list of objects, or one object a line as some hubs write it.
        columns: Names that every row must have.

    Raises:
        MissingError: There is no such file, or Parquet needs a package that is not installed.
        DataError: The format is unknown, the file cannot be read as what it is named, a column is missing, or there are
            no rows.
    """
    path = Path(path)
    kind = _format_of(path)
    if kind == ".parquet":
        rows = _parquet_rows(path)
    else:
        text = read_text(path)
        if kind in (".csv", ".tsv"):
            rows = _separated_rows(text, path, "," if kind == ".csv" else "\t")
        elif kind == ".jsonl":
            rows = _json_lines(text, path)
        else:
            rows = _json_rows(text, path)
    if not rows:
        raise DataError(f"'{path}' holds no rows.", expected="at least one row", found="none", fix="check the file")
    for row in rows:
        _require_columns(row, columns)
    return rows


def read_json(path: Path) -> Any:
    """Return the one JSON value of a file.

    Raises:
        MissingError: There is no such file.
        DataError: It is not JSON, or not text.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"'{path}' is not JSON.", expected="one JSON value", found=str(error), fix="mend it") from error


def read_text(path: Path) -> str:
    """Return a file's text, unzipped where its name ends in `.gz`, without a byte-order mark.

    Raises:
        MissingError: There is no such file.
        DataError: It is not gzip, not UTF-8, or holds NUL bytes; the line is named.
    """
    raw = _read_bytes(path)
    if raw[:2] in _UTF_16:
        raise _not_utf8(path, "UTF-16 (by its first two bytes)")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _not_utf8(path, f"byte 0x{raw[error.start]:02x} in line {line}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"'{path}' holds NUL bytes.",
            expected="plain text",
            found=f"a NUL byte in line {line}",
            fix="save the file as UTF-8 text; perhaps it is UTF-16, or was cut while it was written",
        )
    return text


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise MissingError(
            f"There is no file '{path}'.",
            expected="a file of rows",
            found="a folder" if path.is_dir() else "nothing",
            fix="check the path",
        )
    raw = path.read_bytes()
    if path.suffix != ".gz":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"'{path}' is not a whole gzip file.",
            expected="gzip, as the name says",
            found=str(error),
            fix="get the file again",
        ) from error


def _not_utf8(path: Path, found: str) -> DataError:
    return DataError(f"'{path}' is not UTF-8 text.", expected="UTF-8", found=found, fix="save the file as UTF-8")


def _format_of(path: Path) -> str:
    kind = Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if kind not in FORMATS or (kind == ".parquet" and path.suffix.lower() == ".gz"):
        raise DataError(
            f"'{path}' is in a format that is not read.",
            expected=f"a name that ends in {', '.join(FORMATS)}, perhaps gzipped",
            found=path.name,
            fix="convert the file, or give it the ending of what it holds",
        )
    return kind


def _separated_rows(text: str, path: Path, separator: str) -> list[SourceRow]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[SourceRow] = []
    header: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            line, start = start, reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = _header(fields, path)
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{path} line {line} does not fit its header.",
                    expected=f"{len(header)} fields: {', '.join(header)}",
                    found=f"{len(fields)} fields",
                    fix="quote fields that hold the separator or a line end",
                )
            rows.append(SourceRow(dict(zip(header, fields, strict=True)), str(path), line))
    except csv.Error as error:
        raise DataError(
            f"{path} cannot be read from line {start} on.",
            expected="fields whose quotes are closed and doubled inside",
            found=str(error),
            fix="mend the quotes of that row",
        ) from error
    return rows


def _header(fields: Sequence[str], path: Path) -> list[str]:
    header = [field.strip() for field in fields]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            f"{path} names a column twice.",
            expected="a header of different names",
            found=f"'{twice[0]}' twice",
            fix="rename one of the columns",
        )
    return header


def _json_rows(text: str, path: Path) -> list[SourceRow]:
    try:
        value = json.loads(text)
    except ValueError as error:
        if "Extra data" in str(error):
            return _json_lines(text, path)
        raise DataError(
            f"'{path}' is not JSON.", expected="a JSON list of objects", found=str(error), fix="mend it"
        ) from error
    if isinstance(value, dict):
        return [SourceRow(value, str(path), 1, "entry")]
    if not isinstance(value, list):
        raise DataError(
            f"'{path}' holds no list.", expected="a JSON list of objects", found=_shown(value), fix="make it a list"
        )
    rows: list[SourceRow] = []
    for number, one in enumerate(value, 1):
        row = SourceRow(one if isinstance(one, dict) else {}, str(path), number, "entry")
        if not isinstance(one, dict):
            raise row.malformed("an object", _shown(one))
        rows.append(row)
    return rows


def _json_lines(text: str, path: Path) -> list[SourceRow]:
    rows: list[SourceRow] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise SourceRow({}, str(path), number).malformed("one JSON object on the line", str(error)) from error
        if not isinstance(value, dict):
            raise SourceRow({}, str(path), number).malformed("one JSON object on the line", _shown(value))
        rows.append(SourceRow(value, str(path), number))
    return rows


def _parquet_rows(path: Path) -> list[SourceRow]:
    if not path.is_file():
        _read_bytes(path)
    try:
        pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingError(
            f"'{path}' is a Parquet file, and the package that reads it is not installed.",
            expected="the package pyarrow, of the extra 'data'",
            found="nothing of that name",
            fix="pip install 'keelwright[data]', or give the rows as CSV or JSON lines",
        ) from error
    try:
        values = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"'{path}' is not a Parquet file that can be read.",
            expected="Parquet, as the name says",
            found=str(error).split("\n", 1)[0],
            fix="get the file again, or convert it to JSON lines",
        ) from error
    return [SourceRow(value, str(path), number, "row") for number, value in enumerate(values, 1)]


def _require_columns(row: SourceRow, columns: Sequence[str]) -> None:
    for name in columns:
        if name not in row.values:
            raise DataError(
                f"{row.where} has no column '{name}'.",
                expected=f"columns {', '.join(columns)}",
                found=", ".join(row.values) or "none",
                fix=nearest(name, row.values) if row.values else "give the row its columns",
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
