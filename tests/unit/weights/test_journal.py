# SPDX-License-Identifier: Apache-2.0
"""What survives a kill."""

import os
from pathlib import Path

import pytest

from keelwright.core.errors import StorageError
from keelwright.weights.journal import (
    JOURNAL_FILE,
    PLAN_FILE,
    Journal,
    begin,
    output_place,
    partial_folder,
    read_journal,
    taken_bytes,
)


def test_what_is_appended_is_read_back(tmp_path):
    with Journal(tmp_path) as journal:
        journal.append("wörter.weight", "aa")
        journal.append("b", "bb")
    with Journal(tmp_path) as journal:
        journal.append("c", "cc")
    assert read_journal(tmp_path) == {"wörter.weight": "aa", "b": "bb", "c": "cc"}


def test_no_journal_is_an_empty_one(tmp_path):
    assert read_journal(tmp_path) == {}


def test_a_torn_line_is_ignored_and_does_not_swallow_the_next(tmp_path):
    with Journal(tmp_path) as journal:
        journal.append("a", "aa")
    with (tmp_path / JOURNAL_FILE).open("ab") as stream:
        stream.write(b'\n{"tensor": "b", "sha2')
    with Journal(tmp_path) as journal:
        journal.append("c", "cc")
    assert read_journal(tmp_path) == {"a": "aa", "c": "cc"}


@pytest.mark.parametrize("line", ["[]", '{"tensor": 3, "sha256": "x"}', '{"tensor": "a"}', "\x00\xff"])
def test_lines_that_are_no_rows_are_ignored(tmp_path, line):
    (tmp_path / JOURNAL_FILE).write_text(line)
    assert read_journal(tmp_path) == {}


def test_a_new_output_begins_in_a_partial_folder_that_says_what_it_is(tmp_path):
    partial = begin(tmp_path / "deep" / "out", digest="d1", summary={"method": "linear"})
    assert partial == tmp_path / "deep" / "out.partial"
    assert '"linear"' in (partial / PLAN_FILE).read_text()


def test_the_same_plan_goes_on_in_its_partial_folder(tmp_path):
    first = begin(tmp_path / "out", digest="d1", summary={})
    (first / "kept").write_text("x")
    assert begin(tmp_path / "out", digest="d1", summary={}) == first
    assert (first / "kept").exists()


def test_another_plan_refuses_to_resume(tmp_path):
    partial = begin(tmp_path / "out", digest="d1", summary={})
    with pytest.raises(StorageError) as caught:
        begin(tmp_path / "out", digest="d2", summary={})
    assert str(partial) in caught.value.problem and "another plan" in caught.value.problem
    assert "d2" in caught.value.expected and caught.value.found == "the plan d1"
    assert "delete" in caught.value.fix


def test_files_of_unknown_origin_are_not_built_upon(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "theirs").write_text("x")
    with pytest.raises(StorageError) as caught:
        begin(tmp_path / "out", digest="d", summary={})
    assert "without a plan.json" in caught.value.found


def test_a_partial_path_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "out.partial").write_text("x")
    with pytest.raises(StorageError):
        begin(tmp_path / "out", digest="d", summary={})


def test_an_empty_partial_folder_is_taken(tmp_path):
    (tmp_path / "out.partial").mkdir()
    assert (begin(tmp_path / "out", digest="d", summary={}) / PLAN_FILE).is_file()


def test_an_output_that_is_not_empty_is_an_error(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("x")
    with pytest.raises(StorageError) as caught:
        begin(tmp_path / "out", digest="d", summary={})
    assert "is not empty" in caught.value.problem and caught.value.found == "theirs"
    assert not (tmp_path / "out.partial").exists()


def test_a_parent_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError) as caught:
        begin(tmp_path / "file" / "out", digest="d", summary={})
    assert "cannot be made" in caught.value.problem and caught.value.fix


def test_places_without_a_name_of_their_own_are_resolved(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert output_place(Path()) == here
    assert partial_folder(Path()) == tmp_path / "here.partial"
    (tmp_path / "link").symlink_to(here)
    assert partial_folder(tmp_path / "link") == tmp_path / "here.partial"


def test_only_bytes_that_are_on_the_disk_count_as_taken(tmp_path):
    assert taken_bytes(tmp_path / "out") == 0
    partial = begin(tmp_path / "out", digest="d", summary={})
    (partial / "a.safetensors").write_bytes(os.urandom(8192))
    with (partial / "b.safetensors").open("wb") as stream:
        stream.truncate(1 << 24)
    assert 8192 <= taken_bytes(tmp_path / "out") < 1 << 20
