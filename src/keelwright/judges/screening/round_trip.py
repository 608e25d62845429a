# SPDX-License-Identifier: Apache-2.0
"""A screen for text that is not what it seems to the tokenizer, and the normal form of a text.

What reaches a service is text, and what is trained on are the ids that its tokenizer makes of it. Text is brought into
one form (compatibility characters, invisible characters, runs of space) and read and written once by the tokenizer; the
other screens then see what the training run sees.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from keelwright.data.rows import ChatRow
from keelwright.judges.screening.screen import Screen

_SPACES = re.compile(r"[^\S\n]+")


def plain_text(text: str) -> str:
    """Return the text in Unicode's compatibility form, without control and format characters, with single spaces.

    >>> plain_text("the\\u200b ﬁne   lamp")
    'the fine lamp'
    """
    normal = unicodedata.normalize("NFKC", text)
    visible = "".join(one for one in normal if one in "\n\t" or unicodedata.category(one) not in {"Cc", "Cf"})
    return _SPACES.sub(" ", visible).strip()


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text on its own."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def survives(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Say whether ids, written as text and read again, are the same ids."""
    return token_ids(tokenizer, tokenizer.decode(list(ids))) == list(ids)


@dataclass(frozen=True)
class RoundTrip:
    """Shows another screen the normal form of each row; alone, flags rows without a stable form. Meets `Screen`."""

    tokenizer: PreTrainedTokenizerBase
    inner: Screen | None = None
    """Sees the normal form; None: only the form itself is looked at."""

    @property
    def name(self) -> str:
        """In tables."""
        return "round trip" + (f" + {self.inner.name}" if self.inner else "")

    def normalised(self, row: ChatRow) -> ChatRow:
        """Return the row as it should be screened and trained on."""
        texts = [plain_text(one) for one in (row.prompt, row.answer)]
        prompt, answer = (self.tokenizer.decode(token_ids(self.tokenizer, one)) for one in texts)
        return replace(row, prompt=prompt, answer=answer)

    def flags(self, rows: Sequence[ChatRow]) -> list[bool]:
        """Return for each row whether its ids change on a second reading, or `inner` flags its normal form."""
        normal = [self.normalised(row) for row in rows]
        unstable = [not self._stable(row) for row in normal]
        said = self.inner.flags(normal) if self.inner else [False] * len(rows)
        return [one or other for one, other in zip(unstable, said, strict=True)]

    def _stable(self, row: ChatRow) -> bool:
        return all(survives(self.tokenizer, token_ids(self.tokenizer, text)) for text in (row.prompt, row.answer))
