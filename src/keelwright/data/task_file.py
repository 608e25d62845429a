# SPDX-License-Identifier: Apache-2.0
"""A user's task file: prompts with known answers, one JSON object per line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from keelwright.core.config import nearest
from keelwright.core.errors import DataError
from keelwright.core.records import Item
from keelwright.data.json_lines import read_lines

SCORERS: Final = ("exact", "number", "regex", "choice")
"""exact: the same words; number: the last number; regex: a pattern that must occur; choice: a letter or its option."""

_KEYS: Final = ("prompt", "answer", "scorer", "system", "id")
_EXAMPLE: Final = 'one object per line, e.g. {"prompt": "What is 2 + 3?", "answer": "5", "scorer": "number"}'
_CHOICE: Final = re.compile(r"[A-Za-z]|\([A-Za-z]\)")
_NUMBER: Final = re.compile(r"[-+]?[$€£]?\d[\d,]*(?:\.\d+)?%?")


def read_task_items(path: Path | str) -> list[Item]:
    """Read a task file; blank lines are skipped.

    Args:
        path: UTF-8 JSON lines with `prompt` and `answer`, and perhaps `scorer` (default `exact`), `system` and `id`.

    Returns:
        Items of kind `task`, in file order. The suite is `task:<file stem>`; an item without `id` is named by its line.

    Raises:
        MissingError: There is no such file.
        DataError: The file holds no tasks, or a line is malformed (its number is named).
    """
    path = Path(path)
    items: dict[str, Item] = {}
    for number, line in read_lines(path):
        where = f"{path} line {number}"
        item = _read_item(line, task=path.stem, number=number, where=where)
        if item.item_id in items:
            raise _malformed(where, f"the id '{item.item_id}' a second time")
        items[item.item_id] = item
    if not items:
        raise DataError(f"'{path}' holds no tasks.", expected=_EXAMPLE, found="an empty file", fix="add some tasks")
    return list(items.values())


def _read_item(line: str, *, task: str, number: int, where: str) -> Item:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise _malformed(where, str(error)) from error
    if not isinstance(row, dict):
        raise _malformed(where, f"a {type(row).__name__} instead of an object")
    for key in row:
        if key not in _KEYS:
            raise DataError(
                f"{where}: unknown key '{key}'.",
                expected=f"keys out of {', '.join(_KEYS)}",
                found=key,
                fix=nearest(key, _KEYS),
            )
    answer = row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = f"{answer}"
    name = row.get("id", f"{number:05d}")
    texts = {"prompt": row.get("prompt"), "answer": answer, "id": f"{name}" if isinstance(name, int) else name}
    for key, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise _malformed(where, f"no text under '{key}'")
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise _malformed(where, f"a {type(system).__name__} under 'system'")
    scorer = row.get("scorer", "exact")
    require_scorer(where, scorer, str(answer))
    return Item(
        item_id=f"task/{task}/{texts['id']}",
        suite=f"task:{task}",
        kind="task",
        hazard=task,
        prompt=str(row["prompt"]),
        system=system,
        expected=str(answer),
        scorer=scorer,
    )


def require_scorer(where: str, scorer: Any, answer: str) -> None:
    """Raise unless the scorer is known and can use the answer: a wrong one would count every model as wrong.

    Args:
        where: File and line, for the error text.
        scorer: One of `SCORERS`, if all is well.
        answer: The known answer.

    Raises:
        DataError: There is no such scorer, or it cannot compare anything with this answer.
    """
    if scorer not in SCORERS:
        raise DataError(
            f"{where}: there is no scorer '{scorer}'.",
            expected=f"one of {', '.join(SCORERS)}",
            found=str(scorer),
            fix=nearest(str(scorer), SCORERS),
        )
    if scorer == "number" and not _NUMBER.search(answer):
        raise _malformed(where, f"the scorer 'number' and no number in the answer '{answer}'")
    if scorer == "choice" and not _CHOICE.fullmatch(answer.strip()):
        raise _malformed(where, f"the scorer 'choice' and the answer '{answer}', which is not one letter")
    if scorer == "regex":
        try:
            re.compile(answer)
        except re.error as error:
            raise _malformed(where, f"a pattern that does not compile: {error}") from error


def _malformed(where: str, found: str) -> DataError:
    return DataError(f"{where}: not a task.", expected=_EXAMPLE, found=found, fix="mend the line or remove it")
