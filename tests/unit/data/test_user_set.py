# SPDX-License-Identifier: Apache-2.0
"""A user's own set: what the mapping makes of rows, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Item
from keelwright.data.user_set import read_user_set

TABLE = (
    "no,question,area,label,region\nq1,How do I boil an egg?,kitchen,safe,north\nq2,Step 1: <withheld>?,fire,unsafe,\n"
)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "mine.csv"
    path.write_text(TABLE, encoding="utf-8")
    return path


def test_columns_and_constants_become_items(table: Path) -> None:
    mapping = {
        "prompt": "question",
        "kind": "label",
        "hazard": "area",
        "id": "no",
        "licence": "=MIT",
        "system": "=Be brief.",
        "pair": "=one",
        "cluster": "area",
        "facts.region": "region",
        "materials.note": "=checked",
    }
    items = read_user_set(table, mapping=mapping, name="mine", kinds={"safe": "contrast", "unsafe": "harmful"})
    assert items == [
        Item(
            "mine/q1",
            "mine",
            "contrast",
            "kitchen",
            "How do I boil an egg?",
            system="Be brief.",
            cluster_id="mine/kitchen",
            pair_id="mine/one",
            licence="MIT",
            facts={"region": "north"},
            materials={"note": "checked"},
        ),
        Item(
            "mine/q2",
            "mine",
            "harmful",
            "fire",
            "Step 1: <withheld>?",
            system="Be brief.",
            cluster_id="mine/fire",
            pair_id="mine/one",
            licence="MIT",
            materials={"note": "checked"},
        ),
    ]


def test_without_id_and_hazard_the_line_and_the_name_serve(table: Path) -> None:
    items = read_user_set(table, mapping={"prompt": "question", "kind": "=benign"}, name="mine")
    assert [(item.item_id, item.hazard, item.kind) for item in items] == [
        ("mine/00002", "mine", "benign"),
        ("mine/00003", "mine", "benign"),
    ]


def test_tasks_need_an_answer_that_their_scorer_can_use(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text('{"q": "2 + 3?", "a": 5}\n{"q": "1 + 1?", "a": "two"}\n', encoding="utf-8")
    mapping = {"prompt": "q", "kind": "=task", "expected": "a"}
    assert [(item.expected, item.scorer) for item in read_user_set(path, mapping=mapping, name="sums")] == [
        ("5", "exact"),
        ("two", "exact"),
    ]
    with pytest.raises(DataError, match="line 2: not a task") as caught:
        read_user_set(path, mapping={**mapping, "scorer": "=number"}, name="sums")
    assert "no number in the answer 'two'" in str(caught.value.found)
    with pytest.raises(DataError) as caught:
        read_user_set(path, mapping={"prompt": "q", "kind": "=task"}, name="sums")
    assert caught.value.expected == "a known answer under 'expected', which items of kind task need"


def test_an_unknown_field_is_offered_the_nearest(table: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_user_set(table, mapping={"prompt": "question", "kind": "=benign", "hazzard": "area"}, name="mine")
    assert caught.value.problem == "The mapping names an unknown field 'hazzard'."
    assert caught.value.fix == "did you mean 'hazard'?"


@pytest.mark.parametrize("field", ["prompt", "kind"])
def test_prompt_and_kind_must_be_mapped(table: Path, field: str) -> None:
    mapping = {"prompt": "question", "kind": "=benign"}
    del mapping[field]
    with pytest.raises(ConfigError, match=f"says nothing of '{field}'"):
        read_user_set(table, mapping=mapping, name="mine")


def test_a_kind_that_is_none_is_refused(table: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_user_set(table, mapping={"prompt": "question", "kind": "=harmfull"}, name="mine")
    assert caught.value.fix == "did you mean 'harmful'?"
    with pytest.raises(DataError, match="line 2: 'safe' is not known under 'label'"):
        read_user_set(table, mapping={"prompt": "question", "kind": "label"}, name="mine")


def test_a_column_that_is_not_there_is_offered_the_nearest(table: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_user_set(table, mapping={"prompt": "questions", "kind": "=benign"}, name="mine")
    assert caught.value.fix == "did you mean 'question'?"


def test_a_repeated_id_is_refused(table: Path) -> None:
    with pytest.raises(DataError, match="the id 'mine/same' a second time"):
        read_user_set(table, mapping={"prompt": "question", "kind": "=benign", "id": "=same"}, name="mine")
