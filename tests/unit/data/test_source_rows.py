# SPDX-License-Identifier: Apache-2.0
"""Rows of files that others wrote: every format, and every way in which one can be broken."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from keelwright.core.errors import DataError, MissingError
from keelwright.data.source_rows import Distinct, SourceRow, read_json, read_rows

ROWS = [{"id": "a", "text": "Wie spät ist es?"}, {"id": "b", "text": 'two\nlines, "quoted"'}]
CSV = 'id,text\r\na,Wie spät ist es?\r\n\r\nb,"two\nlines, ""quoted"""\r\n'
LINES = "\n".join(json.dumps(row) for row in ROWS) + "\n"


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", CSV),
        ("rows.csv", "\ufeff" + CSV),
        ("rows.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("rows.tsv", CSV.replace(",Wie", "\tWie").replace("id,text", "id\ttext").replace('b,"', 'b\t"')),
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", LINES),
        ("rows.JSONL", LINES),
        ("rows.jsonl", "\n" + LINES),
        ("rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
    ],
)
def test_every_text_format_gives_the_same_rows(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert [row.values for row in read_rows(write(tmp_path, name, content))] == ROWS


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra data")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    found = read_rows(path)
    assert [row.values for row in found] == ROWS
    assert found[1].where == f"{path} row 2"


def test_parquet_without_its_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path, "rows.parquet", b"PAR1")
    with pytest.raises(MissingError) as caught:
        read_rows(path)
    assert caught.value.expected == "the package pyarrow, of the extra 'data'"
    assert caught.value.fix == "pip install 'keelwright[data]', or give the rows as CSV or JSON lines"


def test_a_file_that_is_only_called_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra data")
    with pytest.raises(DataError, match="is not a Parquet file that can be read"):
        read_rows(write(tmp_path, "rows.parquet", b"id,text\n"))


def test_rows_know_the_line_on_which_they_begin(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", CSV + "c,last\n")
    assert [row.number for row in read_rows(path)] == [2, 4, 6]
    path = write(tmp_path, "rows.jsonl", LINES.replace("\n", "\n\n"))
    assert [row.where for row in read_rows(path)] == [f"{path} line 1", f"{path} line 3"]
    path = write(tmp_path, "rows.json", json.dumps(ROWS))
    assert read_rows(path)[1].where == f"{path} entry 2"


@pytest.mark.parametrize(
    ("name", "content", "problem", "found"),
    [
        ("r.csv", "id,text\na,b,c\n", "line 2 does not fit its header", "3 fields"),
        ("r.csv", "id,text\na,b\nc\n", "line 3 does not fit its header", "1 fields"),
        ("r.csv", 'id,text\na,b\nc,"open\nd,e\n', "cannot be read from line 3 on", "unexpected end of data"),
        ("r.csv", 'id,text\na,"b"c\n', "cannot be read from line 2 on", "',' expected after '\"'"),
        ("r.csv", "id,text,id\na,b,c\n", "names a column twice", "'id' twice"),
        ("r.csv", "", "holds no rows", "none"),
        ("r.csv", "id,text\n\n", "holds no rows", "none"),
        ("r.csv", b"id,text\na,b\nc,caf\xe9\n", "is not UTF-8 text", "byte 0xe9 in line 3"),
        ("r.csv", "id,text\na,b\n".encode("utf-16"), "is not UTF-8 text", "UTF-16 (by its first two bytes)"),
        ("r.csv", b"id,text\na,b\nc,\0\n", "holds NUL bytes", "a NUL byte in line 3"),
        ("r.jsonl", b'{"a": 1}\n\0\n', "holds NUL bytes", "a NUL byte in line 2"),
        ("r.jsonl", '{"a": 1}\n{"a": \n', "line 2 is malformed", "Expecting value"),
        ("r.jsonl", '{"a": 1}\n[1]\n', "line 2 is malformed", "[1]"),
        ("r.jsonl", " \n\n", "holds no rows", "none"),
        ("r.json", "[{]", "is not JSON", "Expecting property name"),
        ("r.json", "[]", "holds no rows", "none"),
        ("r.json", "3", "holds no list", "3"),
        ("r.json", '[{"a": 1}, 7]', "entry 2 is malformed", "7"),
        ("r.jsonl.gz", b"not gzip", "is not a whole gzip file", "Not a gzipped file"),
        (
            "r.jsonl.gz",
            gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9],
            "is not a whole gzip file",
            "Compressed file ended",
        ),
        ("r.xlsx", b"PK", "is in a format that is not read", "r.xlsx"),
        ("r.parquet.gz", b"PAR1", "is in a format that is not read", "r.parquet.gz"),
    ],
)
def test_a_broken_file_is_named_with_the_place(
    tmp_path: Path, name: str, content: str | bytes, problem: str, found: str
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(path) in caught.value.problem
    assert problem in caught.value.problem
    assert found in str(caught.value.found)
    assert caught.value.fix


def test_missing_columns_are_named_with_the_nearest_spelling(tmp_path: Path) -> None:
    path = write(tmp_path, "r.csv", "id,promt\na,b\n")
    with pytest.raises(DataError) as caught:
        read_rows(path, columns=("id", "prompt"))
    assert caught.value.problem == f"{path} line 2 has no column 'prompt'."
    assert caught.value.found == "id, promt"
    assert caught.value.fix == "did you mean 'promt'?"


def test_a_file_that_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="There is no file") as caught:
        read_rows(tmp_path / "none.csv")
    assert caught.value.found == "nothing"
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(MissingError) as caught:
        read_rows(tmp_path / "folder.csv")
    assert caught.value.found == "a folder"


def test_one_json_value_is_read_whole(tmp_path: Path) -> None:
    assert read_json(write(tmp_path, "v.json", '{"a": [1]}')) == {"a": [1]}
    with pytest.raises(DataError, match="is not JSON"):
        read_json(write(tmp_path, "v.json", "{"))


def test_values_are_read_as_what_they_should_be() -> None:
    row = SourceRow({"text": " a ", "n": 3, "count": "7", "yes": "True", "list": ["x"], "in": {"b": 1}}, "f", 1)
    assert row.text("other", "text") == " a "
    assert row.text("n") == "3"
    assert row.maybe("text") == "a"
    assert row.maybe("absent") == ""
    assert row.integer("count") == 7
    assert row.flag("yes") is True
    assert row.texts("list") == ["x"]
    assert row.part("in").values == {"b": 1}
    assert row.choice(("a", "b"), "text") == "a"


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda row: row.text("empty"), "a text under 'empty'"),
        (lambda row: row.text("none"), "a text under 'none'"),
        (lambda row: row.text("list"), "a text under 'list'"),
        (lambda row: row.integer("empty"), "a whole number under 'empty'"),
        (lambda row: row.integer("part"), "a whole number under 'part'"),
        (lambda row: row.flag("word"), "true or false under 'word'"),
        (lambda row: row.texts("word"), "a list of texts under 'word'"),
        (lambda row: row.texts("list"), "a list of texts under 'list'"),
        (lambda row: row.part("word"), "an object under 'word'"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(read, expected: str) -> None:
    row = SourceRow({"empty": " ", "none": None, "part": 2.5, "word": "maybe", "list": [1]}, "f.jsonl", 4)
    with pytest.raises(DataError) as caught:
        read(row)
    assert caught.value.problem == "f.jsonl line 4 is malformed."
    assert caught.value.expected == expected


def test_an_unknown_choice_is_offered_the_nearest() -> None:
    with pytest.raises(DataError) as caught:
        SourceRow({"label": "unsave"}, "f.csv", 9).choice(("safe", "unsafe"), "label")
    assert caught.value.problem == "f.csv line 9: 'unsave' is not known under 'label'."
    assert caught.value.fix == "did you mean 'unsafe'?"


def test_an_absent_column_is_an_error_with_those_that_are_there() -> None:
    with pytest.raises(DataError) as caught:
        SourceRow({"a": 1}, "f.csv", 2).text("prompt", "question")
    assert caught.value.problem == "f.csv line 2 has no column 'prompt'."
    assert caught.value.expected == "'prompt' or 'question'"
    assert caught.value.found == "columns a"


def test_a_repeated_id_is_named_with_both_places() -> None:
    seen = Distinct()
    assert seen.add("x/1", SourceRow({}, "f.csv", 2)) == "x/1"
    with pytest.raises(DataError) as caught:
        seen.add("x/1", SourceRow({}, "f.csv", 5))
    assert caught.value.problem == "f.csv line 5 has the id 'x/1' a second time."
    assert caught.value.found == "the same id in f.csv line 2"
