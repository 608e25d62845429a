# SPDX-License-Identifier: Apache-2.0
"""How a task item's answer is compared with the known one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Final

from keelwright.core.config import require_choice
from keelwright.core.errors import DataError
from keelwright.core.records import Generation, Item, Judgement
from keelwright.judges.normalise import normalise

TOLERANCE: Final = 1e-6
"""Relative difference up to which two numbers are the same."""

_NUMBER: Final = re.compile(r"(?<![\w.])[-+]?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])", re.I)
_DECLARED: Final = re.compile(
    r"\b(?i:answer|choice|option)\b\W*(?i:is|would be)?\W*\(?(?:([A-Z]|[b-hj-z])\b(?!')|(a|i)(?=[).,:;]|\s*$))"
)
"""A small "a" or "i" after the word is a letter only where the clause ends; else it begins a phrase."""
_LEADING: Final = re.compile(r"^\W*(?:([A-Za-z])(?:[).:,]|\s*$|\s*\n)|([B-HJ-Z])\s)")
_BRACKETED: Final = re.compile(r"\(([A-Za-z])\)")


def score_exact(answer: str, expected: str) -> bool:
    """Whether both say the same: case, spacing, markdown and marks around the answer do not count."""
    return _words(answer) == _words(expected)


def score_number(answer: str, expected: str) -> bool:
    """Whether the last number of the answer equals the expected one, within a relative 1e-6."""
    said, wanted = last_number(answer), last_number(expected)
    return said is not None and wanted is not None and math.isclose(said, wanted, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def score_regex(answer: str, expected: str) -> bool:
    """Whether the pattern `expected` occurs in the answer; `.` also matches line ends."""
    return re.search(expected, answer, flags=re.DOTALL) is not None


def score_choice(answer: str, expected: str, *, prompt: str = "") -> bool:
    """Whether the answer picks the expected letter, by the letter itself or by the option's text in the prompt.

    Args:
        answer: The model's words.
        expected: One letter, with or without brackets.
        prompt: The question with its options, one per line (`A) Paris`), to recognise an option quoted in full.
    """
    wanted = expected.strip().strip("()").lower()
    letter = chosen_letter(answer)
    if letter is not None:
        return letter == wanted
    named = [key for key, text in options_of(prompt).items() if text and text == _words(answer)]
    return named == [wanted]


def last_number(text: str) -> float | None:
    """Return the last number in a text, thousands separators, currency and percent signs aside; None without one."""
    found = [match for match in _NUMBER.findall(text) if any(char.isdigit() for char in match)]
    if not found:
        return None
    return float(re.sub(r"[,$€£]", "", found[-1]))


def chosen_letter(answer: str) -> str | None:
    """Return the letter that an answer picks, lower case: declared, leading, or bracketed; None when it picks none."""
    text = normalise(answer)
    declared = _DECLARED.findall(text)
    if declared:
        return "".join(declared[-1]).lower()
    leading = _LEADING.match(text)
    if leading:
        return str(leading.group(1) or leading.group(2)).lower()
    bracketed = {letter.lower() for letter in _BRACKETED.findall(text)}
    return bracketed.pop() if len(bracketed) == 1 else None


def options_of(prompt: str) -> dict[str, str]:
    """Return the options of a multiple-choice prompt: letter to normalised text."""
    lines = re.findall(r"^\s*\(?([A-Za-z])[).:]\s+(.+)$", prompt, flags=re.MULTILINE)
    return {letter.lower(): _words(text) for letter, text in lines}


class TaskJudge:
    """Judges task items by their scorer; meets `core.protocols.Judge`."""

    judge_id = "task@1"

    def judge(self, item: Item, generation: Generation) -> Judgement:
        """Return `correct` with score 1 or `wrong` with score 0; `error` where there is no output.

        Raises:
            DataError: The item has no known answer.
            ConfigError: Its scorer is unknown.
        """
        if item.expected is None:
            raise DataError(
                f"Task item '{item.item_id}' has no known answer.",
                expected="an item with 'expected'",
                found="none",
                fix="give the item its answer",
            )
        if generation.finish == "error":
            return Judgement("error", raw="no output")
        scorer = item.scorer or "exact"
        require_choice("scorer", scorer, (*_SCORERS, "choice"))
        if scorer == "choice":
            right = score_choice(generation.output, item.expected, prompt=item.prompt)
        else:
            right = _SCORERS[scorer](generation.output, item.expected)
        return Judgement("correct" if right else "wrong", score=float(right), raw=scorer)


_SCORERS: Mapping[str, Callable[[str, str], bool]] = {
    "exact": score_exact,
    "number": score_number,
    "regex": score_regex,
}


def _words(text: str) -> str:
    # Only marks around the answer are punctuation: inside it they may be a decimal point, or the plus signs of "C++".
    return " ".join(normalise(text).casefold().split()).strip(" .!?,;:\"'")
