# SPDX-License-Identifier: Apache-2.0
"""MBPP: the paper's prompt, splits by task id, setup after the answer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.sets.catalogue import load_set
from keelwright.data.sets.mbpp import SPLITS, entry_point, read_mbpp


def problem(number: int, **changes: object) -> dict[str, object]:
    return {
        "text": f"Write a function to add {number}. ",
        "code": f"def helper(x):\r\n    return x\r\ndef add(x):\r\n    return helper(x) + {number}\r\n",
        "task_id": number,
        "test_setup_code": "",
        "test_list": [f"assert add(1) == {number + 1}", f"assert add(0) == {number}"],
        "challenge_test_list": [],
        **changes,
    }


def test_the_prompt_is_the_task_with_its_assertions(rows) -> None:
    (item,) = read_mbpp(rows(problem(11)))
    assert item.prompt == (
        "You are an expert Python programmer, and here is your task: Write a function to add 11. "
        "Your code should pass these tests:\n\nassert add(1) == 12\nassert add(0) == 11\n[BEGIN]\n"
    )
    assert (item.item_id, item.scorer, item.facts) == ("mbpp/11", "tests", {"split": "test"})
    assert item.materials["entry_point"] == "add"
    assert "\r" not in "".join(item.materials.values())


def test_the_known_solution_passes_with_a_setup_that_uses_it(rows) -> None:
    (item,) = read_mbpp(rows(problem(11, test_setup_code="one = add(1)\r\n", test_list=["assert one == 12"])))
    exec("\n".join(item.materials[part] for part in ("canonical", "setup", "tests")), {})


def test_solved_problems_are_shown_in_the_order_of_the_paper(rows) -> None:
    items = read_mbpp(rows(*(problem(number) for number in (1, 2, 3, 11))), shots=2)
    prompt = items[3].prompt
    assert prompt.count("[BEGIN]") == 3
    assert prompt.count("[DONE]\n\n") == 2
    assert prompt.index("to add 2.") < prompt.index("to add 3.") < prompt.index("to add 11.")
    with pytest.raises(DataError, match="Problem 4 of MBPP is to be shown solved"):
        read_mbpp(rows(problem(2), problem(3)), shots=3)


def test_the_entry_point_is_what_the_tests_call() -> None:
    assert entry_point("class A:\n    pass\ndef f():\n    pass\n", ["assert f() is None"]) == "f"
    assert entry_point("def f():\n    pass\n", ["assert g()"]) == ""


def test_splits_follow_the_task_id(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(problem(number)) for number in (1, 11, 511, 601))
    (tmp_path / "mbpp.jsonl").write_text(lines, encoding="utf-8")
    loaded = load_set("mbpp", data=tmp_path)
    assert [item.item_id for item in loaded.items] == ["mbpp/11"]
    assert loaded.left_out == {"not of the split test": 3}
    assert [item.item_id for item in load_set("mbpp", data=tmp_path, split="train").items] == ["mbpp/601"]
    with pytest.raises(ConfigError, match="'shots' is out of range"):
        load_set("mbpp", data=tmp_path, shots=11)


def test_one_parquet_file_per_split_is_one_set(tmp_path: Path) -> None:
    """As the hub lays it out."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra data")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "full").mkdir()
    for split, number in (("prompt", 1), ("test", 11), ("validation", 511), ("train", 601)):
        rows = pyarrow.Table.from_pylist([problem(number)])
        parquet.write_table(rows, tmp_path / "full" / f"{split}-00000-of-00001.parquet")
    loaded = load_set("mbpp", data=tmp_path, split="all")
    assert [item.item_id for item in loaded.items] == ["mbpp/1", "mbpp/11", "mbpp/511", "mbpp/601"]
    assert len(loaded.paths) == 4
    assert loaded.items[1].materials["tests"] == "assert add(1) == 12\nassert add(0) == 11\n"


def test_a_problem_without_assertions_is_refused(rows) -> None:
    with pytest.raises(DataError, match="line 2 is malformed"):
        read_mbpp(rows(problem(11, test_list=[])))


def test_the_published_file_has_the_published_counts(published) -> None:
    """974 problems in splits of 10, 500, 90 and 374: arXiv 2108.07732, section 2.1, and the repository's page."""
    items = published("mbpp", split="all").items
    assert len(items) == 974
    assert Counter(item.facts["split"] for item in items) == {
        "prompt": 10,
        "test": 500,
        "validation": 90,
        "train": 374,
    }
    assert sum(len(numbers) for name, numbers in SPLITS.items() if name != "all") == 974
    assert all(item.materials["entry_point"] for item in items)
    assert sum(bool(item.materials["setup"]) for item in items) == 2


def test_shown_problems_are_another_set(tmp_path: Path) -> None:
    (tmp_path / "mbpp.jsonl").write_text("".join(json.dumps(problem(number)) + "\n" for number in (2, 3, 4, 11)))
    plain, shown, said = (load_set("mbpp", data=tmp_path, **options) for options in ({}, {"shots": 1}, {"shots": 0}))
    assert plain.items[0].item_id == shown.items[0].item_id
    assert plain.items[0].prompt != shown.items[0].prompt
    # Otherwise a comparison would take answers with an example for answers without one.
    assert plain.digest != shown.digest
    assert plain.digest == said.digest
