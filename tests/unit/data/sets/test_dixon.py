# SPDX-License-Identifier: Apache-2.0
"""Sentences from templates and Wikipedia comments of Dixon et al."""

from __future__ import annotations

from collections import Counter

import pytest

from keelwright.core.errors import DataError
from keelwright.data.sets.dixon import read_comments, read_madlibs


def test_sentences_keep_their_template(rows) -> None:
    (text,) = read_madlibs(rows({"Text": "hug gardeners", "Label": "NOT_BAD", "Template": "verb_adj"}))
    assert (text.text_id, text.label, text.toxic) == ("dixon-madlibs/1", "NOT_BAD", False)
    assert text.facts == {"template": "verb_adj"}
    with pytest.raises(DataError, match="'GOOD' is not known under 'Label'"):
        read_madlibs(rows({"Text": "hug gardeners", "Label": "GOOD", "Template": "verb_adj"}))


def test_comments_are_named_by_their_revision(rows) -> None:
    (text,) = read_comments(rows({"rev_id": "12", "comment": " Thanks! ", "toxic": "False"}))
    assert (text.text_id, text.label, text.toxic, text.text) == ("dixon-comments/12", "nontoxic", False, " Thanks! ")
    with pytest.raises(DataError) as caught:
        read_comments(rows({"rev_id": "12", "comment": "a", "toxic": "perhaps"}))
    assert caught.value.expected == "true or false under 'toxic'"


def test_the_published_files_have_the_published_counts(published) -> None:
    """76,564 sentences, half of them bad, and 1,492 comments, 248 toxic: the files' own counts."""
    assert Counter(text.toxic for text in published("dixon-madlibs").texts) == {True: 38282, False: 38282}
    assert Counter(text.toxic for text in published("dixon-comments").texts) == {False: 1244, True: 248}
