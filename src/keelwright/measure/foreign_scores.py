# SPDX-License-Identifier: Apache-2.0
"""Scores of other programs' scorers as judgements.

A score is kept as the number that the scorer gave. Its label says whether that is the full mark:

| the scorer wrote | score | label |
|---|---|---|
| `C`, true, yes, 1 | 1 | correct |
| `P`, a number between 0 and 1 | 0.5, the number | wrong |
| `I`, `N` (no answer), false, no, 0 | 0 | wrong |
| a number on another scale | the number | unparsed |
| other words, NaN | none | unparsed |

So a metric of foreign scores reads scores, not labels.

Source:
    Inspect's `value_to_float` (inspect.aisi.org.uk/scorers.html) for the letters and words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from keelwright.core.records import Judgement

_WORDS: Final[Mapping[str, float]] = {
    "c": 1.0, "yes": 1.0, "true": 1.0, "p": 0.5, "i": 0.0, "n": 0.0, "no": 0.0, "false": 0.0,
}  # fmt: skip


def judgement_of(value: object, *, raw: str | None = None) -> Judgement:
    """Return the judgement of one score, by the rule of this module.

    Args:
        value: A word, a number or a truth value; anything else is `unparsed`.
        raw: The scorer's own explanation.
    """
    number = _number(value)
    if number is None:
        return Judgement("unparsed", raw=str(value) if raw is None and value is not None else raw)
    if not math.isfinite(number):
        return Judgement("unparsed", raw=raw or "not a finite number")
    if not 0.0 <= number <= 1.0:
        return Judgement("unparsed", score=number, raw=raw)
    return Judgement("correct" if number == 1.0 else "wrong", score=number, raw=raw)


def flattened(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield a score's parts by name: `helpful.tone` for a score of several values, `name` for a single one."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from flattened(f"{name}.{key}", part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, part in enumerate(value):
            yield from flattened(f"{name}.{index}", part)
    else:
        yield name, value


def put_first(judgements: Mapping[str, Judgement], primary: str, *, failed: bool) -> dict[str, Judgement]:
    """Return the judgements with the primary one first; one that is missing says why.

    Args:
        judgements: By scorer.
        primary: The scorer that a record's own label comes from.
        failed: Whether there is no answer to judge.
    """
    missing = Judgement("error", raw="no answer") if failed else Judgement("unparsed", raw="not scored")
    return {primary: judgements.get(primary, missing), **judgements}


def _number(value: object) -> float | None:
    if isinstance(value, str):
        word = value.strip().lower()
        try:
            return _WORDS[word] if word in _WORDS else float(word)
        except ValueError:
            return None
    return float(value) if isinstance(value, (bool, int, float)) else None
