# SPDX-License-Identifier: Apache-2.0
"""Records as a Parquet table, and back."""

import dataclasses
import json
import sys

import pytest

from keelwright.core.errors import DataError, MissingError, StorageError
from keelwright.core.records import Judgement, Record
from keelwright.runs.folder import RunFolder, RunSpec, read_run
from keelwright.runs.interop import parquet
from keelwright.runs.interop.parquet import read_parquet, write_parquet, write_records

arrow = pytest.importorskip("pyarrow", reason="the extra data is not installed")
import pyarrow.parquet as tables  # noqa: E402


def record(number, **changes):
    several = {"task@1": Judgement("wrong", 0.0, "exact"), "other": Judgement("correct", 1.0)}
    opinions = several if number % 2 else {"exact@1": Judgement("refusal_full")}
    fields = {
        "item_id": f"i{number}", "suite": "core", "suite_digest": "s0", "kind": "task", "hazard": "theft",
        "prompt": "a \u2028 é", "model_id": "tuned", "revision": "r0", "template_digest": "t0",
        "decoding_digest": "d0", "output": "", "n_tokens": 3, "finish": "eos", "judgements": opinions,
        "seed": 2**62 if number % 3 else None, "facts": {"domain": "QA"} if number % 2 else {"topic": ""},
    }  # fmt: skip
    return Record(**{**fields, **changes})


def test_every_field_of_a_record_has_a_column():
    fields = {field.name for field in dataclasses.fields(Record)}
    assert fields == set(parquet._TYPES) | {"judgements", "facts"}


def test_a_table_reads_back_as_the_records_that_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS", 4)
    records = [record(i) for i in range(10)]
    records[3] = dataclasses.replace(records[3], judgements=dict(reversed(records[3].judgements.items())))
    path = write_records(records, tmp_path / "t.parquet")
    back = list(read_parquet(path))
    assert back == records
    assert list(back[3].judgements) == ["other", "task@1"]
    assert tables.ParquetFile(path).num_row_groups == 3


def test_judgements_and_facts_are_columns_of_their_own(tmp_path):
    table = tables.read_table(write_records([record(1), record(2)], tmp_path / "t.parquet"))
    assert table["judge.task@1.score"].to_pylist() == [0.0, None]
    assert table["judge.exact@1.label"].to_pylist() == [None, "refusal_full"]
    assert table["judges"].to_pylist() == [["task@1", "other"], ["exact@1"]]
    assert table["fact.domain"].to_pylist() == ["QA", None]


def test_a_run_is_exported_with_what_it_was(tmp_path):
    with RunFolder.open(tmp_path / "run", RunSpec("audit", ("keelwright",), {}, 3, {})) as run:
        for number in range(3):
            run.append(record(number))
    path = write_parquet(tmp_path / "run", tmp_path / "out" / "t.parquet")
    assert list(read_parquet(path)) == read_run(tmp_path / "run").records()
    about = json.loads(tables.read_schema(path).metadata[b"keelwright"])["about"]
    assert (about["command"], about["seed"]) == ("audit", 3)


def test_no_records_make_an_empty_table(tmp_path):
    assert list(read_parquet(write_records([], tmp_path / "t.parquet"))) == []


def test_nothing_is_overwritten(tmp_path):
    path = write_records([record(1)], tmp_path / "t.parquet")
    with pytest.raises(StorageError, match="is there already"):
        write_records([record(2)], path)
    assert list(read_parquet(path)) == [record(1)]


def test_records_that_can_be_read_once_are_refused(tmp_path):
    with pytest.raises(DataError, match="only once") as caught:
        write_records(iter([record(1)]), tmp_path / "t.parquet")
    assert "list(records)" in str(caught.value)


def test_files_that_are_no_table_of_records_are_refused(tmp_path):
    with pytest.raises(MissingError, match="There is no file"):
        next(read_parquet(tmp_path / "none.parquet"))
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="not a whole Parquet file"):
        next(read_parquet(path))
    tables.write_table(arrow.table({"x": [1]}), path)
    with pytest.raises(DataError, match="another program"):
        next(read_parquet(path))


def test_a_table_of_another_version_is_refused(tmp_path):
    path = write_records([record(1)], tmp_path / "t.parquet")
    table = tables.read_table(path)
    about = {**json.loads(table.schema.metadata[b"keelwright"]), "schema": 2}
    tables.write_table(table.replace_schema_metadata({b"keelwright": json.dumps(about)}), path)
    with pytest.raises(DataError, match="not a table of records") as caught:
        next(read_parquet(path))
    assert "found:    version 2" in str(caught.value)


def test_a_table_without_one_of_its_columns_names_the_row(tmp_path):
    path = write_records([record(1), record(3)], tmp_path / "t.parquet")
    tables.write_table(tables.read_table(path).drop_columns(["hazard"]), path)
    with pytest.raises(DataError, match="row 1: not a record") as caught:
        list(read_parquet(path))
    assert "KeyError: 'hazard'" in str(caught.value)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (lambda: write_records([], tmp_path / "t.parquet"), lambda: next(read_parquet(tmp_path / "t"))):
        with pytest.raises(MissingError, match="not installed") as caught:
            call()
        assert 'pip install "keelwright[data]"' in str(caught.value)
