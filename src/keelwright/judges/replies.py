# SPDX-License-Identifier: Apache-2.0
"""Replies of judges, read strictly: what is not exactly in the format is not read at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_END_OF_THOUGHT: Final = "</think>"
_MARKS: Final = " \t*_`\"'.:"


def after_thinking(reply: str) -> str:
    """Return what a reasoning model says after its last thought; the reply itself where it does not think."""
    return reply.rpartition(_END_OF_THOUGHT)[2].strip()


def tagged(reply: str, tag: str, choices: Sequence[str]) -> str | None:
    """Return the value after a tag such as `#thescore:`, in lower case; None unless there is exactly one answer.

    The tag must stand in the last line that says something. If it stands elsewhere too, all must agree: a judge that
    quotes "#thescore: 1" out of the text it grades, and then prints 5, has not said what it means.

    Args:
        reply: The judge's words.
        tag: With its colon.
        choices: Values that count, in lower case.
    """
    text = after_thinking(reply)
    values = [match.strip(_MARKS).lower() for match in re.findall(rf"{re.escape(tag)}([^\n]*)", text, re.IGNORECASE)]
    if not values or len(set(values)) > 1 or values[-1] not in choices:
        return None
    last = text.splitlines()[-1].strip(_MARKS).lower()
    return values[-1] if last.startswith(tag.lower().strip(_MARKS)) else None


def first_word_line(reply: str, choices: Sequence[str]) -> str | None:
    """Return the first line where it is one of the choices and no other line is another of them; else None.

    Args:
        reply: The judge's words.
        choices: Words, in lower case.
    """
    lines = [line.strip(_MARKS).lower() for line in after_thinking(reply).splitlines() if line.strip()]
    said = {line for line in lines if line in choices}
    return lines[0] if len(said) == 1 and lines[0] in said else None


def fields(reply: str, names: Sequence[str]) -> dict[str, str] | None:
    """Return the values of lines `Name: value`, in lower case; None unless each name has exactly one line.

    Args:
        reply: The judge's words.
        names: Names of the lines, as the judge writes them; their case does not count.
    """
    found: dict[str, set[str]] = {name: set() for name in names}
    known = {name.lower(): name for name in names}
    for line in after_thinking(reply).splitlines():
        head, colon, value = line.partition(":")
        name = known.get(head.strip(_MARKS + "-#").lower())
        if colon and name is not None:
            found[name].add(value.strip(_MARKS).lower())
    if any(len(values) != 1 for values in found.values()):
        return None
    return {name: values.pop() for name, values in found.items()}
