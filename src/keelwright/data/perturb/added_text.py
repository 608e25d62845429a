# SPDX-License-Identifier: Apache-2.0
"""The families that add text: misleading suffixes, distracting suffixes, and requests for worse code.

Where the text goes is a choice that changes figures, so it is explicit: `user_turn` adds a paragraph at the end of
the user's words, for models that chat; `comment` adds comment lines, for models that go on writing a file. In both it
goes before a final `[BEGIN]`, which says that code follows.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from keelwright.data.code_prompt import INDENT

Placement = Literal["user_turn", "comment"]

_BEGIN: Final = re.compile(r"\s*(\[BEGIN\]\s*)\Z")


def add_text(prompt: str, text: str, placement: Placement) -> str:
    """Return the prompt with the text at its end.

    Args:
        prompt: The user's words.
        text: What to add, without line ends around it.
        placement: `user_turn` or `comment`.
    """
    mark = _BEGIN.search(prompt)
    body, closing = (prompt[: mark.start()], "\n" + mark[1]) if mark else (prompt, "")
    if placement == "user_turn":
        return f"{body.rstrip()}\n\n{text}\n{closing}"
    comment = "".join(f"{INDENT}# {line}\n" for line in text.splitlines())
    return f"{body.rstrip()}\n{comment}{closing}"
