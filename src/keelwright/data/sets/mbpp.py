# SPDX-License-Identifier: Apache-2.0
"""MBPP: short Python problems in one sentence, each with three assertions.

The prompt is the one of the paper: the task, its assertions and an opening mark; `shots` problems out of the first
ten are shown solved before it. (The paper shows three, 2 to 4; the default here is none, as for models that chat.) An
answer passes when the program made of it, then `setup` and then `tests` runs to its end: two problems' setup uses
classes of the answer.

Source:
    Austin et al., Program Synthesis with Large Language Models, arXiv 2108.07732; split by task id as its repository
    says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import DataError
from keelwright.core.records import Item
from keelwright.data.sets.spec import Contents, Files
from keelwright.data.source_rows import Distinct, SourceRow, read_rows

LICENCE: Final = "CC-BY-4.0"
SPLITS: Final[Mapping[str, range]] = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
    "all": range(1, 975),
}
"""Task ids of each split."""
SHOWN: Final = (2, 3, 4, 1, 5, 6, 7, 8, 9, 10)
"""Task ids that are shown solved, in order: those of the paper first."""

_DEFINITION: Final = re.compile(r"^def\s+(\w+)", re.MULTILINE)
_CALL: Final = re.compile(r"\b(\w+)\s*\(")


def load_mbpp(
    files: Files, *, split: Literal["prompt", "test", "validation", "train", "all"] = "test", shots: int = 0
) -> Contents:
    """Read the problems of one split.

    Args:
        files: Role `problems`: one file, or one per split.
        split: Which task ids, after `SPLITS`.
        shots: How many problems of the split `prompt` are shown solved before each, 0 to 10.

    Raises:
        ConfigError: The split is not known, or there are not so many problems to show.
        DataError: A row is malformed or repeated, or a problem to show is not in the files.
    """
    require_choice("split", split, SPLITS)
    require_in_range("shots", shots, low=0, high=len(SHOWN))
    rows = [row for path in files["problems"] for row in read_rows(path)]
    items = read_mbpp(rows, shots=shots)
    wanted = [item for item, row in zip(items, rows, strict=True) if row.integer("task_id") in SPLITS[split]]
    left = len(items) - len(wanted)
    return Contents(items=tuple(wanted), left_out={f"not of the split {split}": left} if left else {})


def read_mbpp(rows: Sequence[SourceRow], *, shots: int = 0) -> list[Item]:
    """Turn rows of task_id, text, code, test_setup_code and test_list into items.

    Raises:
        DataError: A row is malformed or repeated, or a problem to show is not among the rows.
    """
    seen = Distinct()
    shown = _solved(rows, SHOWN[:shots])
    items = []
    for row in rows:
        number, code, tests = row.integer("task_id"), _unix(row.text("code")), row.texts("test_list")
        if not tests:
            raise row.malformed("assertions under 'test_list'", "none")
        items.append(
            Item(
                item_id=seen.add(f"mbpp/{number}", row),
                suite="mbpp",
                kind="task",
                hazard="code",
                prompt=shown + question(row),
                scorer="tests",
                licence=LICENCE,
                facts={"split": _split_of(number)},
                materials={
                    "tests": "".join(f"{_unix(test)}\n" for test in tests),
                    "entry_point": entry_point(code, tests),
                    "canonical": code,
                    "setup": _unix(row.maybe("test_setup_code")),
                },
            )
        )
    return items


def question(row: SourceRow) -> str:
    """Return the paper's prompt for one problem, up to the mark after which the code comes."""
    tests = "\n".join(_unix(test) for test in row.texts("test_list"))
    return (
        f"You are an expert Python programmer, and here is your task: {row.text('text', 'prompt').strip()} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def entry_point(code: str, tests: Sequence[str]) -> str:
    """Return the name of the function that the tests call, out of those that the code defines; empty if none."""
    called = set(_CALL.findall("\n".join(tests)))
    return next((name for name in reversed(_DEFINITION.findall(code)) if name in called), "")


def _solved(rows: Sequence[SourceRow], numbers: Sequence[int]) -> str:
    by_number = {row.integer("task_id"): row for row in rows}
    for number in numbers:
        if number not in by_number:
            raise DataError(
                f"Problem {number} of MBPP is to be shown solved, and is not in the file.",
                expected="the problems 1 to 10",
                found=f"{len(by_number)} problems without it",
                fix="use the whole file, or fewer shots",
            )
    rows_shown = [by_number[number] for number in numbers]
    return "".join(f"{question(row)}{_unix(row.text('code')).rstrip()}\n[DONE]\n\n" for row in rows_shown)


def _split_of(number: int) -> str:
    return next((name for name, numbers in SPLITS.items() if number in numbers), "none")


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n")
