# SPDX-License-Identifier: Apache-2.0
"""Parts of a programming problem's prompt: the opened function that it ends in, and what stands around it."""

from __future__ import annotations

import ast
import functools
import re
import warnings
from dataclasses import dataclass
from typing import Final

INDENT: Final = "    "

_AROUND: Final = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign)
"""What may stand before the opened function; a word of prose would parse as an expression."""


@dataclass(frozen=True, slots=True)
class CodePrompt:
    """A prompt cut into three: `before + stub + after` is the prompt."""

    before: str
    stub: str
    """Imports and helpers, then the signature and docstring of the function; empty where the prompt holds no code."""
    after: str


@functools.lru_cache(maxsize=512)
def split_prompt(prompt: str, entry_point: str) -> CodePrompt:
    """Cut a prompt at the opened function.

    Args:
        prompt: The user's words: a problem, perhaps with text before and after.
        entry_point: The function's name; empty where it is not known.

    Returns:
        The three parts; all of the prompt is `before` where it opens no such function.
    """
    lines = prompt.splitlines(keepends=True)
    first = next((number for number, line in enumerate(lines) if opens(line, entry_point)), None)
    if first is None:
        return CodePrompt(prompt, "", "")
    end = next((end for end in range(len(lines), first, -1) if _opened(lines[first:end], entry_point)), None)
    if end is None:
        return CodePrompt(prompt, "", "")
    start = next(start for start in range(first + 1) if _opened(lines[start:end], entry_point))
    return CodePrompt("".join(lines[:start]), "".join(lines[start:end]), "".join(lines[end:]))


def preamble_of(stub: str, entry_point: str) -> str:
    """Return what a stub holds before its function: imports, helpers, constants."""
    lines = stub.splitlines(keepends=True)
    first = next((number for number, line in enumerate(lines) if opens(line, entry_point)), 0)
    while first and lines[first - 1].startswith("@"):
        first -= 1
    return "".join(lines[:first])


def opens(line: str, entry_point: str) -> bool:
    """Whether a line begins the definition of the function."""
    return bool(entry_point) and re.match(rf"(?:async\s+)?def\s+{re.escape(entry_point)}\s*\(", line) is not None


def parsed(code: str) -> ast.Module | None:
    """Return the code's syntax tree, or None where it is not Python."""
    try:
        with warnings.catch_warnings():
            # An invalid escape in somebody's string is not this process's concern.
            warnings.simplefilter("ignore")
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def docstring_lines(stub: str, entry_point: str) -> range:
    """Return the numbers, from 0, of the stub's lines that the function's docstring covers; empty without one."""
    tree = parsed(f"{stub.rstrip()}\n{INDENT}pass\n")
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == entry_point:
            text = node.body[0]
            if (
                isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                return range(text.lineno - 1, text.end_lineno or text.lineno)
    return range(0)


def _opened(lines: list[str], entry_point: str) -> bool:
    """Whether the lines, with a body added, are definitions of which the last is the function's."""
    tree = parsed("".join(lines).rstrip() + f"\n{INDENT}pass\n")
    if tree is None or not tree.body:
        return False
    *around, last = tree.body
    return getattr(last, "name", None) == entry_point and all(
        isinstance(node, _AROUND) or _is_text(node) for node in around
    )


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
