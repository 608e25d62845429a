# SPDX-License-Identifier: Apache-2.0
"""HateCheck: labelled texts with their functionality."""

from __future__ import annotations

from collections import Counter

import pytest

from keelwright.core.errors import DataError
from keelwright.data.sets.hatecheck import read_hatecheck

ROW = {
    "functionality": "ident_pos_nh",
    "case_id": "12",
    "test_case": "I like gardeners.",
    "label_gold": "non-hateful",
    "target_ident": "gardeners",
    "direction": "-",
    "templ_id": "3",
}


def test_functionality_and_template_are_kept(rows) -> None:
    (text,) = read_hatecheck(rows(ROW))
    assert (text.text_id, text.label, text.toxic) == ("hatecheck/12", "non-hateful", False)
    assert text.cluster_id == "hatecheck/template-3"
    assert text.facts == {"functionality": "ident_pos_nh", "target": "gardeners"}


def test_an_unknown_label_is_refused(rows) -> None:
    with pytest.raises(DataError, match="'hatefull' is not known") as caught:
        read_hatecheck(rows({**ROW, "label_gold": "hatefull"}))
    assert caught.value.fix == "did you mean 'hateful'?"


def test_the_published_file_has_the_published_counts(published) -> None:
    """3,728 cases of 29 functionalities, 2,563 of them hateful: arXiv 2012.15606, section 3."""
    texts = published("hatecheck").texts
    assert Counter(text.toxic for text in texts) == {True: 2563, False: 1165}
    assert len({text.facts["functionality"] for text in texts}) == 29
