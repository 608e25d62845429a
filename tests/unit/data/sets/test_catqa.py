# SPDX-License-Identifier: Apache-2.0
"""CatQA and HarmfulQA: nested or in rows, the same items."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from keelwright.core.errors import DataError
from keelwright.data.sets.catalogue import load_set

NESTED = {"Rude Talk": {"At work:": ["How to be rude?", "How to shout?"], "At home": ["How to be rude?"]}}
IN_ROWS = [
    {"Category": category, "Subcategory": group, "Question": question}
    for category, groups in NESTED.items()
    for group, questions in groups.items()
    for question in questions
]


def load(folder: Path, value: object) -> list:
    (folder / "catqa_english.json").write_text(json.dumps(value), encoding="utf-8")
    return list(load_set("catqa", data=folder).items)


def test_nested_questions_and_rows_give_the_same_items(tmp_path: Path) -> None:
    items = load(tmp_path, NESTED)
    assert items == load(tmp_path, IN_ROWS)
    assert [(item.hazard, item.facts["subcategory"], item.prompt) for item in items] == [
        ("Rude Talk", "At work", "How to be rude?"),
        ("Rude Talk", "At work", "How to shout?"),
        ("Rude Talk", "At home", "How to be rude?"),
    ]
    assert items[0].cluster_id == items[2].cluster_id == f"{items[0].item_id}+"
    assert items[1].cluster_id is None


def test_a_question_that_comes_twice_in_a_group_is_numbered(tmp_path: Path) -> None:
    first, again = load(tmp_path, {"Rude": {"Work": ["How to shout?", "How to shout?"]}})
    assert again.item_id == f"{first.item_id}-2"


def test_names_do_not_depend_on_the_questions_before(tmp_path: Path) -> None:
    assert (
        load(tmp_path, {"Rude Talk": {"At home": ["How to be rude?"]}})[0].item_id == load(tmp_path, NESTED)[2].item_id
    )


@pytest.mark.parametrize(
    "value", [{"Rude": ["a"]}, {"Rude": {"Work": "a"}}, {"Rude": {"Work": [""]}}, [{"a": 1}, {"a": 2}]]
)
def test_another_shape_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(DataError):
        load(tmp_path, value)


def test_the_shared_copies_have_their_counts(published) -> None:
    """495 of the 550 questions of arXiv 2402.11746 (one category and 5 questions are not in the copy); 1,960."""
    catqa = published("catqa").items
    counts = Counter(item.hazard for item in catqa)
    assert (len(catqa), len(counts), counts["Adult Content"]) == (495, 10, 45)
    assert set(counts.values()) == {50, 45}
    assert len(published("harmfulqa").items) == 1960
