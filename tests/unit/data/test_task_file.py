# SPDX-License-Identifier: Apache-2.0
"""Task files: what is read, and how a bad line is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from keelwright.core.errors import DataError, MissingError
from keelwright.data.task_file import read_task_items

WriteFile = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> WriteFile:
    """Write a task file called sums.jsonl."""

    def write_text(text: str) -> Path:
        path = tmp_path / "sums.jsonl"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


def test_rows_become_task_items_in_file_order(write: WriteFile) -> None:
    path = write(
        '{"prompt": "2 + 3?", "answer": "5", "scorer": "number"}\n'
        "\n"
        '{"prompt": "Colour of\\u2028grass?", "answer": "green", "system": "Be brief.", "id": "grass"}\n'
        '{"prompt": "1 + 1?", "answer": 2}\n'
    )
    items = read_task_items(path)
    assert [item.item_id for item in items] == ["task/sums/00001", "task/sums/grass", "task/sums/00004"]
    assert {(item.suite, item.kind, item.hazard) for item in items} == {("task:sums", "task", "sums")}
    assert [item.scorer for item in items] == ["number", "exact", "exact"]
    assert [item.expected for item in items] == ["5", "green", "2"]
    assert (items[1].system, items[1].prompt) == ("Be brief.", "Colour of\u2028grass?")


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": "b"}\r\n{"prompt": "c", "answer": "d"}\r\n')
    assert [item.prompt for item in read_task_items(path)] == ["a", "c"]


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_refused(write: WriteFile, text: str) -> None:
    with pytest.raises(DataError, match="holds no tasks") as caught:
        read_task_items(write(text))
    assert caught.value.found == "an empty file"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"prompt": "a"}', "no text under 'answer'"),
        ('{"prompt": " ", "answer": "b"}', "no text under 'prompt'"),
        ('{"prompt": "a", "answer": true}', "no text under 'answer'"),
        ('["a", "b"]', "a list instead of an object"),
        ('{"prompt": "a", "answer": "b", "system": 3}', "a int under 'system'"),
        ('{"prompt": "a", "answer": "(", "scorer": "regex"}', "a pattern that does not compile"),
        ('{"prompt": "a", "answer": "five", "scorer": "number"}', "no number in the answer 'five'"),
        ('{"prompt": "a", "answer": "Paris", "scorer": "choice"}', "which is not one letter"),
        ('{"prompt": "a", "answer": "b"', "delimiter"),
        ('{"prompt": "x", "answer": "y", "id": "first"}', "the id 'task/sums/first' a second time"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(write: WriteFile, line: str, found: str) -> None:
    path = write('{"prompt": "a", "answer": "b", "id": "first"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=r"sums\.jsonl line 3: not a task") as caught:
        read_task_items(path)
    assert found in str(caught.value.found)
    assert caught.value.fix == "mend the line or remove it"
    assert "one object per line" in str(caught.value.expected)


def test_an_unknown_key_or_scorer_is_refused_with_the_nearest_name(write: WriteFile) -> None:
    with pytest.raises(DataError, match="line 1: unknown key 'anwser'") as caught:
        read_task_items(write('{"prompt": "a", "anwser": "b"}'))
    assert caught.value.fix == "did you mean 'answer'?"
    with pytest.raises(DataError, match="line 1: there is no scorer 'numbers'") as caught:
        read_task_items(write('{"prompt": "a", "answer": "1", "scorer": "numbers"}'))
    assert caught.value.fix == "did you mean 'number'?"


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="There is no file") as caught:
        read_task_items(tmp_path / "none.jsonl")
    assert caught.value.found == "nothing"
    with pytest.raises(MissingError) as caught:
        read_task_items(tmp_path)
    assert caught.value.found == "a folder"
    (tmp_path / "raw.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_task_items(tmp_path / "raw.jsonl")
