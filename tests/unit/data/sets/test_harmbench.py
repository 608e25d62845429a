# SPDX-License-Identifier: Apache-2.0
"""HarmBench: contexts sent along, categories chosen, splits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from keelwright.core.errors import ConfigError, DataError, MissingError
from keelwright.data.sets.catalogue import load_set
from keelwright.data.sets.harmbench import read_harmbench

TABLE = """Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID
<first thing withheld>,standard,illegal,,,first
<second asks for it>,contextual,harmful,context,Once upon a time.,second
<third wants more>,contextual,harmful,context,Once upon a time.,third
<a song>,copyright,copyright,lyrics,,song
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "harmbench_behaviors_text_all.csv").write_text(TABLE, encoding="utf-8")
    return tmp_path


def test_a_context_is_sent_before_its_behaviour(folder: Path) -> None:
    items = load_set("harmbench", data=folder).items
    assert [item.prompt for item in items] == [
        "<first thing withheld>",
        "Once upon a time.\n\n---\n\n<second asks for it>",
        "Once upon a time.\n\n---\n\n<third wants more>",
    ]
    assert [(item.item_id, item.hazard, item.kind) for item in items[:2]] == [
        ("harmbench/first", "illegal", "harmful"),
        ("harmbench/second", "harmful", "harmful"),
    ]
    assert [item.cluster_id for item in items] == [None, "harmbench/second+", "harmbench/second+"]


def test_copyright_is_left_out_and_counted_unless_asked_for(folder: Path) -> None:
    assert load_set("harmbench", data=folder).left_out == {"functional category copyright": 1}
    chosen = load_set("harmbench", data=folder, functional="copyright")
    assert [item.facts["functional"] for item in chosen.items] == ["copyright"]


def test_an_unknown_category_is_offered_the_nearest(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_set("harmbench", data=folder, functional=["standart"])
    assert caught.value.fix == "did you mean 'standard'?"


def test_splits_follow_the_validation_file(folder: Path) -> None:
    with pytest.raises(MissingError, match="needs its validation file"):
        load_set("harmbench", data=folder, split="val")
    head, first, *_ = TABLE.splitlines()
    (folder / "harmbench_behaviors_text_val.csv").write_text(f"{head}\n{first}\n", encoding="utf-8")
    assert [item.item_id for item in load_set("harmbench", data=folder, split="val").items] == ["harmbench/first"]
    test = load_set("harmbench", data=folder, split="test")
    assert [item.item_id for item in test.items] == ["harmbench/second", "harmbench/third"]
    assert test.left_out["not of the split test"] == 1


def test_a_contextual_behaviour_without_context_is_refused(rows) -> None:
    row = {"Behavior": "a", "FunctionalCategory": "contextual", "SemanticCategory": "harmful", "BehaviorID": "x"}
    with pytest.raises(DataError, match="line 2 is malformed"):
        read_harmbench(rows({**row, "ContextString": ""}))


def test_the_published_file_has_the_published_counts(published) -> None:
    """400 behaviours: 200 standard, 100 contextual, 100 copyright; 80 for validation (arXiv 2402.04249)."""
    every = published("harmbench", functional=("standard", "contextual", "copyright"))
    assert Counter(item.facts["functional"] for item in every.items) == {
        "standard": 200,
        "contextual": 100,
        "copyright": 100,
    }
    assert len(published("harmbench").items) == 300
    assert len(published("harmbench", functional=["standard"], split="val").items) == 41
    assert len(published("harmbench", functional=["standard"], split="test").items) == 159
