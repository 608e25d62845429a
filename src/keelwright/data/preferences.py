# SPDX-License-Identifier: Apache-2.0
"""Preference pairs: a prompt with a better and a worse answer, read from JSON lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keelwright.core.errors import DataError
from keelwright.data.json_lines import read_lines

_EXPECTED: Final = 'an object with the texts "prompt", "chosen" and "rejected", and perhaps "system"'
_FIX: Final = 'write one object per line, e.g. {"prompt": "...", "chosen": "...", "rejected": "..."}'


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """One prompt with two answers."""

    prompt: str
    chosen: str
    """The better answer, for example a refusal of a harmful request."""
    rejected: str
    """The worse answer."""
    system: str | None = None


def read_preference_rows(path: Path | str) -> list[PreferenceRow]:
    """Read the pairs of a JSON-lines file; blank lines are skipped.

    Args:
        path: UTF-8 text. Each line holds `prompt`, `chosen` and `rejected`, all texts, and perhaps `system`.

    Raises:
        MissingError: There is no such file.
        DataError: A line is malformed (its number is named), or the file holds no rows.
    """
    path = Path(path)
    rows = [_read_row(line, where=f"{path} line {number}") for number, line in read_lines(path)]
    if not rows:
        raise DataError(f"'{path}' holds no pairs.", expected="at least one pair", found="an empty file", fix=_FIX)
    return rows


def _read_row(line: str, *, where: str) -> PreferenceRow:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is not JSON.", expected=_EXPECTED, found=str(error), fix=_FIX) from error
    texts = row if isinstance(row, dict) else {}
    wrong = [key for key in ("prompt", "chosen", "rejected") if not _is_text(texts.get(key))]
    if wrong or not isinstance(texts.get("system"), str | None):
        found = f"no text in {', '.join(wrong)}" if wrong else f"system = {texts['system']!r}"
        raise DataError(f"{where} is not a preference pair.", expected=_EXPECTED, found=found, fix=_FIX)
    return PreferenceRow(texts["prompt"], texts["chosen"], texts["rejected"], texts.get("system"))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
