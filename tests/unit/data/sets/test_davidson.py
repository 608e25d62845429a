# SPDX-License-Identifier: Apache-2.0
"""The tweets of Davidson et al.: three classes with their votes, from the repository's file or the hub's."""

from __future__ import annotations

from collections import Counter

import pytest

from keelwright.core.errors import DataError
from keelwright.data.sets.davidson import read_davidson

ROW = {
    "": "7",
    "count": "3",
    "hate_speech": "0",
    "offensive_language": "1",
    "neither": "2",
    "class": "2",
    "tweet": "Hi",
}


def test_class_and_votes_are_kept(rows) -> None:
    (text,) = read_davidson(rows(ROW))
    assert (text.text_id, text.label, text.toxic) == ("davidson-hate/7", "neither", False)
    assert text.facts == {"votes": "hate=0 offensive=1 neither=2"}


def test_the_hubs_columns_are_read_too(rows) -> None:
    row = {"hate_speech_count": 3, "offensive_language_count": 0, "neither_count": 0, "class": 0, "tweet": "<withheld>"}
    (text,) = read_davidson(rows(row))
    assert (text.text_id, text.label, text.toxic) == ("davidson-hate/0", "hate", True)


def test_another_class_is_refused(rows) -> None:
    with pytest.raises(DataError, match="'3' is not known under 'class'"):
        read_davidson(rows({**ROW, "class": "3"}))


def test_the_published_file_has_the_published_counts(published) -> None:
    """24,783 tweets; the counts by class are the file's own (arXiv 1703.04009)."""
    texts = published("davidson-hate").texts
    assert Counter(text.label for text in texts) == {"hate": 1430, "offensive": 19190, "neither": 4163}
