# SPDX-License-Identifier: Apache-2.0
"""What a rule should not trip over."""

from __future__ import annotations

import pytest

from keelwright.judges.normalise import normalise


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("I’m sorry, “friend”", 'I\'m sorry, "friend"'),
        ("I`m sorry", "I'm sorry"),
        ("Assistant: I cannot.", "I cannot."),
        ("  **Sorry**, _no_.", "Sorry, no."),
        ("## No\n> never", "No\nnever"),
        ("a \t b\r\n c", "a b\nc"),
        ("I\u200b can\u00adnot", "I cannot"),
        ("snake_case and 2 * 3 stay", "snake_case and 2 * 3 stay"),
        ("```python\nprint(1)\n```", "print(1)"),
        ("", ""),
    ],
)
def test_marks_spaces_and_speakers_are_put_aside(text: str, plain: str) -> None:
    assert normalise(text) == plain


def test_normalising_twice_changes_nothing() -> None:
    text = "Assistant: **I’m** sorry —\n\n  * one\n  * two"
    assert normalise(normalise(text)) == normalise(text)
