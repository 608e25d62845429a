# SPDX-License-Identifier: Apache-2.0
"""Beginnings of sentences with scores: items to continue, and texts to compare scorers on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from keelwright.core.errors import DataError
from keelwright.data.sets.catalogue import load_set
from keelwright.data.sets.decodingtrust import read_toxicity_items


def line(begin: int, toxicity: float | None, **changes: object) -> dict[str, object]:
    return {
        "filename": "0001-abc.txt",
        "begin": begin,
        "end": begin + 9,
        "challenging": False,
        "prompt": {"text": "The weather was", "toxicity": toxicity, "threat": 0.25},
        "continuation": {"text": " fine."},
        **changes,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toxic.jsonl").write_text(json.dumps(line(3, 0.75, challenging=True)), encoding="utf-8")
    (tmp_path / "nontoxic.jsonl").write_text(json.dumps(line(3, 0.125)), encoding="utf-8")
    return tmp_path


def test_prompts_become_items_and_labelled_texts_of_one_name(folder: Path) -> None:
    loaded = load_set("decodingtrust-toxicity", data=folder)
    assert [(item.item_id, item.kind, item.hazard, item.facts) for item in loaded.items] == [
        (
            "decodingtrust-toxicity/toxic-0001-abc-3-12",
            "benign",
            "toxic",
            {"challenging": "true", "prompt_toxicity": "0.750"},
        ),
        (
            "decodingtrust-toxicity/nontoxic-0001-abc-3-12",
            "benign",
            "nontoxic",
            {"challenging": "false", "prompt_toxicity": "0.125"},
        ),
    ]
    assert [text.text_id for text in loaded.texts] == [item.item_id for item in loaded.items]
    assert loaded.texts[0].scores == {"toxicity": 0.75, "threat": 0.25}
    assert [text.toxic for text in loaded.texts] == [True, False]
    assert len(load_set("decodingtrust-toxicity", data=folder, parts="toxic").items) == 1


def test_a_prompt_without_a_score_is_an_item_and_no_labelled_text(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line(3, None)), encoding="utf-8")
    loaded = load_set("realtoxicityprompts", data=tmp_path)
    assert (len(loaded.items), len(loaded.texts)) == (1, 0)
    assert loaded.items[0].item_id == "realtoxicityprompts/0001-abc-3-12"
    assert loaded.items[0].facts == {"challenging": "false"}


@pytest.mark.parametrize("toxicity", [1.5, "high", True])
def test_a_score_outside_0_to_1_is_refused(rows, toxicity: object) -> None:
    with pytest.raises(DataError) as caught:
        read_toxicity_items(rows(line(3, toxicity)), suite="s", part="toxic", licence="L")
    assert caught.value.expected == "a score in [0, 1] under 'toxicity'"


def test_the_published_files_have_the_published_counts(published) -> None:
    """1,196 toxic and 1,200 other prompts: the files of the official repository of arXiv 2306.11698."""
    loaded = published("decodingtrust-toxicity")
    assert Counter(item.hazard for item in loaded.items) == {"toxic": 1196, "nontoxic": 1200}
    assert len(loaded.texts) == 2396
