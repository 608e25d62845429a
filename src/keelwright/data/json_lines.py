# SPDX-License-Identifier: Apache-2.0
"""JSON-lines files as users write them: UTF-8, one object a line, blank lines allowed."""

from __future__ import annotations

from pathlib import Path

from keelwright.core.errors import DataError, MissingError


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines that hold something, each with its number.

    Args:
        path: UTF-8 text, with or without a byte-order mark. Only line feeds end a line.

    Raises:
        MissingError: There is no such file.
        DataError: The file is not UTF-8.
    """
    if not path.is_file():
        raise MissingError(
            f"There is no file '{path}'.",
            expected="a JSON-lines file of prompts and answers",
            found="a folder" if path.is_dir() else "nothing",
            fix="check the path",
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8 text.", expected="a UTF-8 JSON-lines file", found=str(error), fix="save it as UTF-8"
        ) from error
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
