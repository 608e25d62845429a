# SPDX-License-Identifier: Apache-2.0
"""Rows to train on: a prompt and its answer, read from JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keelwright.core.config import require_in_range
from keelwright.core.errors import DataError
from keelwright.data.json_lines import read_lines

_ANSWER_KEYS: Final = ("answer", "response", "completion")
_EXPECTED: Final = 'an object with "prompt" and "answer" (or "response", "completion"), or with "messages"'
_FIX: Final = 'write one object per line, e.g. {"prompt": "...", "answer": "..."}'


@dataclass(frozen=True, slots=True)
class Cut:
    """How much of an answer's given beginning is kept, in tokens of the model that learns from it."""

    share: float = 1.0
    """Share of the tokens that may be kept, rounded up to whole ones; above 0, at most 1."""
    most: int | None = None
    """Only so many of the first tokens may be kept, at least 1; None: all of them."""

    def __post_init__(self) -> None:
        require_in_range("share", self.share, low=0.0, high=1.0, low_open=True)
        require_in_range("most", 1 if self.most is None else self.most, low=1)

    def kept(self, tokens: int) -> int:
        """Return how many of the first tokens stay: uniform over 1, 2, ... where `share` is uniform over (0, 1]."""
        return math.ceil(self.share * (tokens if self.most is None else min(tokens, self.most)))


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One turn to learn from. The loss falls on the answer alone."""

    prompt: str
    answer: str
    system: str | None = None
    prefill: str = ""
    """How the assistant's reply begins: the model reads it and does not learn it. The answer follows without a gap."""
    prefill_cut: Cut | None = None
    """Where the beginning is broken off; None: it is kept whole."""


def read_chat_rows(path: Path | str) -> list[ChatRow]:
    """Read the rows of a JSON-lines file; blank lines are skipped.

    Args:
        path: UTF-8 text. Each line holds `prompt` and `answer` (or `response`, `completion`), perhaps `system`, and
            perhaps `prefill`, the beginning of the reply, which is given and not learned; or `messages`: one user
            message and the assistant's reply, perhaps after a system message.

    Raises:
        MissingError: There is no such file.
        DataError: A line is malformed (its number is named), or the file holds no rows.
    """
    path = Path(path)
    rows = [_read_row(line, where=f"{path} line {number}") for number, line in read_lines(path)]
    if not rows:
        raise DataError(f"'{path}' holds no rows.", expected="at least one row", found="an empty file", fix=_FIX)
    return rows


def _read_row(line: str, *, where: str) -> ChatRow:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON.", expected=_EXPECTED, found=str(error), fix=_FIX) from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a row.", expected=_EXPECTED, found=type(row).__name__, fix=_FIX)
    if "messages" in row:
        return _from_messages(row["messages"], where=where)
    answer_key = next((key for key in _ANSWER_KEYS if key in row), "answer")
    system = None if row.get("system") is None else _text_of(row, "system", where=where)
    prefill = "" if row.get("prefill") in (None, "") else _text_of(row, "prefill", where=where)
    return ChatRow(_text_of(row, "prompt", where=where), _text_of(row, answer_key, where=where), system, prefill)


def _text_of(row: Mapping[str, Any], name: str, *, where: str) -> str:
    text = row.get(name)
    if not isinstance(text, str) or not text.strip():
        found = f"keys {', '.join(row) or 'none'}" if text is None else f"{name} = {text!r}"
        raise DataError(f"{where} has no text in '{name}'.", expected=_EXPECTED, found=found, fix=_FIX)
    return text


def _from_messages(messages: Any, *, where: str) -> ChatRow:
    """Accept what one turn can hold; a longer conversation would have to be cut, so it is refused."""
    fine = isinstance(messages, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in messages
    )
    roles = [one["role"] for one in messages] if fine else []
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]) or not all(
        one["content"].strip() for one in messages
    ):
        raise DataError(
            f"{where} has messages that are not one turn.",
            expected="messages of user and assistant, perhaps after one of system, each with text",
            found=f"roles {', '.join(roles) or 'none'}" if fine else repr(messages)[:80],
            fix="keep one user message and its reply per line",
        )
    texts = {one["role"]: one["content"] for one in messages}
    return ChatRow(prompt=texts["user"], answer=texts["assistant"], system=texts.get("system"))
