# SPDX-License-Identifier: Apache-2.0
"""From an answer to a program: the one extractor, used alike for clean and for attacked runs.

What it copes with: code between fences, prose before and after, a signature that is repeated without the prompt's
imports, a bare body that continues the prompt, a first line that lost its indentation, and the marks of MBPP's prompt.
It never mends code: an answer that is cut off in a line stays a syntax error.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from typing import Final

from keelwright.data.code_prompt import INDENT, opens, parsed, preamble_of, split_prompt

_FENCE: Final = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n`]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_MARKS: Final = re.compile(r"\[(?:DONE|/PYTHON|END)\].*\Z", re.DOTALL)
_OPENING_MARK: Final = re.compile(r"\A\s*\[(?:BEGIN|PYTHON)\][ \t]*\n?")
_CODE_LINE: Final = re.compile(r"(?:async\s+def|def|class|import|from)\s+\w|@\w|#|\w+\s*=[^=]")


def extract_code(answer: str, prompt: str, entry_point: str) -> str:
    """Return the program that an answer offers.

    Args:
        answer: The model's words.
        prompt: What it was asked; the imports and the signature in it complete an answer that lacks them.
        entry_point: The function that the tests call; empty where it is not known.

    Returns:
        Python as the model wrote it, perhaps after the prompt's own lines; not checked any further.
    """
    text = _MARKS.sub("", _OPENING_MARK.sub("", answer.replace("\r\n", "\n").replace("\r", "\n")))
    stub = split_prompt(prompt.replace("\r\n", "\n"), entry_point).stub
    blocks = [match.group(2) for match in _FENCE.finditer(text)]
    code = _best_block(blocks, entry_point) if blocks else _without_prose(text, entry_point)
    if code is not None and (not stub or any(opens(line, entry_point) for line in code.splitlines())):
        return f"{preamble_of(stub, entry_point)}{code}"
    return stub + _as_body(stub, blocks[0] if blocks else text, entry_point)


def _best_block(blocks: Sequence[str], entry_point: str) -> str | None:
    """Return the first block that solves something, after the blocks before it that are Python too."""
    for index, block in enumerate(blocks):
        if _solves(block, entry_point):
            helpers = [one for one in blocks[:index] if parsed(one) is not None]
            return "\n".join([*helpers, block])
    named = [block for block in blocks if any(opens(line, entry_point) for line in block.splitlines())]
    if named:
        return named[0]
    return None if entry_point else blocks[0]


def _without_prose(text: str, entry_point: str) -> str | None:
    """Return the stretch of lines that is Python and solves something; else all from the first line of code."""
    lines = text.splitlines(keepends=True)
    starts = [number for number, line in enumerate(lines) if _CODE_LINE.match(line)]
    for start in starts:
        for end in _ends(lines, start):
            code = "".join(lines[start:end])
            if _solves(code, entry_point):
                return code
    if any(opens(line, entry_point) for line in lines) or (starts and not entry_point):
        return "".join(lines[starts[0] :])
    return None


def _ends(lines: Sequence[str], start: int) -> Iterator[int]:
    """Yield where code that begins at `start` may end: at the end, or before a line that is not indented."""
    yield len(lines)
    for number in range(len(lines) - 1, start, -1):
        if lines[number][:1].strip():
            yield number


def _solves(code: str, entry_point: str) -> bool:
    """Whether the code is Python and gives the function, or any function where it is not known, a body."""
    tree = parsed(code)
    return tree is not None and any(_gives(node, entry_point) for node in tree.body)


def _gives(node: ast.stmt, entry_point: str) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return entry_point in ("", node.name) and not all(map(_is_empty, node.body))
    if isinstance(node, ast.Assign):
        return any(isinstance(one, ast.Name) and one.id == entry_point for one in node.targets)
    return isinstance(node, ast.ClassDef) and node.name == entry_point


def _is_empty(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _as_body(stub: str, text: str, entry_point: str) -> str:
    """Return the text as the body of the opened function: the first reading of its indentation that is Python."""
    lines = text.strip("\n").splitlines(keepends=True)
    if not lines:
        return ""
    first = [INDENT + lines[0].lstrip(), *lines[1:]]
    whole = [INDENT + line if line.strip() else line for line in lines]
    readings = [_until_outside(lines), "".join(whole), _until_outside(first)]
    readings += ["".join(whole[:end]) for end in _ends(lines, 0)]
    opened = _statements(f"{stub.rstrip()}\n{INDENT}pass\n", entry_point)
    # A line that slips out of the function leaves it no longer than the stub.
    return next((body for body in readings if _statements(stub + body, entry_point) >= opened), readings[0])


def _statements(code: str, entry_point: str) -> int:
    """Count the statements of the function's body; 0 where the code is not Python or has no such function."""
    tree = parsed(code)
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == entry_point:
            return len(node.body)
    return 0


def _until_outside(lines: Sequence[str]) -> str:
    """Return the lines up to the first that is not indented: what a completion adds after its function."""
    end = next((number for number, line in enumerate(lines) if number and line[:1].strip()), len(lines))
    return "".join(lines[:end])
