# SPDX-License-Identifier: Apache-2.0
"""Texts that show unintended bias of a toxicity scorer: sentences made from templates, and Wikipedia comments.

Source:
    Dixon et al., Measuring and Mitigating Unintended Bias in Text Classification, AIES 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from keelwright.data.labelled import LabelledText
from keelwright.data.sets.spec import Contents, Files
from keelwright.data.source_rows import Distinct, SourceRow, read_rows

MADLIBS_LICENCE: Final = "Apache-2.0"
COMMENTS_LICENCE: Final = "CC-BY-SA (Wikipedia comments), Apache-2.0 (repository)"


def load_madlibs(files: Files) -> Contents:
    """Read the sentences made from templates."""
    return Contents(texts=tuple(read_madlibs(read_rows(files["sentences"][0]))))


def load_comments(files: Files) -> Contents:
    """Read the comments."""
    return Contents(texts=tuple(read_comments(read_rows(files["comments"][0]))))


def read_madlibs(rows: Sequence[SourceRow]) -> list[LabelledText]:
    """Turn rows of Text, Label and Template into labelled texts, numbered in file order from 1.

    Raises:
        DataError: A row is malformed, or its label is neither BAD nor NOT_BAD.
    """
    texts = []
    for number, row in enumerate(rows, 1):
        label = row.choice(("BAD", "NOT_BAD"), "Label")
        texts.append(
            LabelledText(
                text_id=f"dixon-madlibs/{number}",
                suite="dixon-madlibs",
                text=row.text("Text"),
                label=label,
                toxic=label == "BAD",
                licence=MADLIBS_LICENCE,
                facts={"template": row.text("Template").strip()},
            )
        )
    return texts


def read_comments(rows: Sequence[SourceRow]) -> list[LabelledText]:
    """Turn rows of rev_id, comment and toxic into labelled texts.

    Raises:
        DataError: A row is malformed or repeated.
    """
    seen = Distinct()
    texts = []
    for row in rows:
        toxic = row.flag("toxic")
        texts.append(
            LabelledText(
                text_id=seen.add(f"dixon-comments/{row.text('rev_id').strip()}", row),
                suite="dixon-comments",
                text=row.text("comment"),
                label="toxic" if toxic else "nontoxic",
                toxic=toxic,
                licence=COMMENTS_LICENCE,
            )
        )
    return texts
