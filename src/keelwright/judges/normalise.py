# SPDX-License-Identifier: Apache-2.0
"""Answers as plain text: what a rule should not trip over is put aside first."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

_MARKS: Final = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "´": "'", "“": '"', "”": '"', "–": "-", "—": "-"})
_SPEAKER: Final = re.compile(r"^(?:assistant|ai|bot|model|answer|response)\s*:\s*", re.IGNORECASE)
_MARKDOWN: Final = re.compile(r"(?m)^\s{0,3}(?:#{1,6}|>+)\s+|\*\*|__|~~|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)")
_BACKTICK: Final = re.compile(r"(?<=\w)`(?=\w)")
_FENCE: Final = re.compile(r"(?m)^\s*```\w*\s*$")
_INVISIBLE: Final = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")


def normalise(text: str) -> str:
    """Return the text with straight quotes, without invisible characters, emphasis marks and a leading `Assistant:`.

    Line ends stay; runs of other white space become one space.
    """
    plain = _INVISIBLE.sub("", unicodedata.normalize("NFC", text)).translate(_MARKS)
    plain = _BACKTICK.sub("'", plain)
    plain = _MARKDOWN.sub("", _FENCE.sub("", plain))
    plain = re.sub(r"[^\S\n]+", " ", plain.replace("\r\n", "\n").replace("\r", "\n"))
    plain = re.sub(r" ?\n ?", "\n", plain).strip()
    return _SPEAKER.sub("", plain).lstrip()
