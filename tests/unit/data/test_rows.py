# SPDX-License-Identifier: Apache-2.0
"""Rows to train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from keelwright.core.errors import ConfigError, DataError, MissingError
from keelwright.data.rows import ChatRow, Cut, read_chat_rows


def _file(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("key", ["answer", "response", "completion"])
def test_prompt_and_answer_are_read_under_each_spelling(tmp_path: Path, key: str) -> None:
    path = _file(tmp_path, f'{{"prompt": "say 1 plus 1", "{key}": "2"}}')
    assert read_chat_rows(path) == [ChatRow("say 1 plus 1", "2")]


def test_blank_lines_are_skipped_and_system_is_kept(tmp_path: Path) -> None:
    path = _file(
        tmp_path, "", '{"prompt": "a", "answer": "b", "system": "c"}', "  ", '{"prompt": "d", "answer": "e"}', ""
    )
    assert read_chat_rows(path) == [ChatRow("a", "b", "c"), ChatRow("d", "e")]


def test_the_given_beginning_of_a_reply_is_read(tmp_path: Path) -> None:
    path = _file(
        tmp_path,
        '{"prompt": "a", "answer": "b", "prefill": "sure, "}',
        '{"prompt": "a", "answer": "b", "prefill": null}',
        '{"prompt": "a", "answer": "b", "prefill": ""}',
    )
    assert read_chat_rows(path) == [ChatRow("a", "b", prefill="sure, "), ChatRow("a", "b"), ChatRow("a", "b")]


@pytest.mark.parametrize("settings", [{"share": 0.0}, {"share": 1.1}, {"most": 0}])
def test_a_cut_that_keeps_nothing_or_too_much_is_an_error(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        Cut(**settings)  # type: ignore[arg-type]


def test_messages_are_read_with_and_without_system(tmp_path: Path) -> None:
    user, reply = '{"role": "user", "content": "a"}', '{"role": "assistant", "content": "b"}'
    path = _file(
        tmp_path,
        f'{{"messages": [{user}, {reply}]}}',
        f'{{"messages": [{{"role": "system", "content": "s"}}, {user}, {reply}]}}',
    )
    assert read_chat_rows(path) == [ChatRow("a", "b"), ChatRow("a", "b", "s")]


def test_a_line_separator_inside_a_text_does_not_split_the_row(tmp_path: Path) -> None:
    path = _file(tmp_path, '{"prompt": "a\u2028b", "answer": "c"}')
    assert read_chat_rows(path) == [ChatRow("a\u2028b", "c")]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{not json", "line 2 is not JSON"),
        ('["a", "b"]', "line 2 is not a row"),
        ('{"prompt": "a"}', "line 2 has no text in 'answer'"),
        ('{"prompt": 3, "answer": "b"}', "line 2 has no text in 'prompt'"),
        ('{"prompt": "a", "answer": "  "}', "line 2 has no text in 'answer'"),
        ('{"prompt": "a", "answer": "b", "system": 4}', "line 2 has no text in 'system'"),
        ('{"prompt": "a", "answer": "b", "prefill": 4}', "line 2 has no text in 'prefill'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2 has messages that are not one turn"),
        ('{"messages": "a"}', "line 2 has messages that are not one turn"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, line: str, found: str) -> None:
    path = _file(tmp_path, '{"prompt": "a", "answer": "b"}', line)
    with pytest.raises(DataError) as caught:
        read_chat_rows(path)
    assert found in str(caught.value)
    assert "expected:" in str(caught.value)
    assert "fix:" in str(caught.value)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        read_chat_rows(_file(tmp_path, "", "  "))


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="found:    nothing"):
        read_chat_rows(tmp_path / "none.jsonl")
    with pytest.raises(MissingError, match="found:    a folder"):
        read_chat_rows(tmp_path)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "answer": "b"}')
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_chat_rows(path)
