# SPDX-License-Identifier: Apache-2.0
"""Tweets labelled as hate speech, offensive language or neither, with the votes behind the label.

Source:
    Davidson et al., Automated Hate Speech Detection and the Problem of Offensive Language, ICWSM 2017, arXiv
    1703.04009.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from keelwright.data.labelled import LabelledText
from keelwright.data.sets.spec import Contents, Files
from keelwright.data.source_rows import Distinct, SourceRow, read_rows

LICENCE: Final = "MIT"
CLASSES: Final = {"0": "hate", "1": "offensive", "2": "neither"}

_VOTES: Final = (("hate", "hate_speech"), ("offensive", "offensive_language"), ("neither", "neither"))


def load_davidson(files: Files) -> Contents:
    """Read the tweets."""
    return Contents(texts=tuple(read_davidson(read_rows(files["tweets"][0]))))


def read_davidson(rows: Sequence[SourceRow]) -> list[LabelledText]:
    """Turn rows of tweet, class and votes into labelled texts; named by the file's index, or by their place.

    Raises:
        DataError: A row is malformed or repeated, or its class is not 0, 1 or 2.
    """
    seen = Distinct()
    texts = []
    for place, row in enumerate(rows):
        label = CLASSES[row.choice(tuple(CLASSES), "class")]
        votes = {name: row.integer(column, f"{column}_count") for name, column in _VOTES}
        texts.append(
            LabelledText(
                text_id=seen.add(f"davidson-hate/{row.maybe('') or place}", row),
                suite="davidson-hate",
                text=row.text("tweet"),
                label=label,
                toxic=label != "neither",
                licence=LICENCE,
                facts={"votes": " ".join(f"{name}={count}" for name, count in votes.items())},
            )
        )
    return texts
