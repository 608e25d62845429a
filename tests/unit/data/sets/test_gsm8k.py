# SPDX-License-Identifier: Apache-2.0
"""GSM8K: the number after the mark."""

from __future__ import annotations

from pathlib import Path

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.sets.catalogue import load_set
from keelwright.data.sets.gsm8k import read_gsm8k


@pytest.mark.parametrize(
    ("ending", "expected"), [("#### 18", "18"), ("#### 2,125", "2125"), ("####-3 ", "-3"), ("#### .5\n", ".5")]
)
def test_the_number_after_the_mark_is_expected(rows, ending: str, expected: str) -> None:
    (item,) = read_gsm8k(rows({"question": "How many?", "answer": f"Nine and nine.\n{ending}"}), split="test")
    assert (item.item_id, item.expected, item.scorer) == ("gsm8k/test-1", expected, "number")
    assert item.materials == {"solution": "Nine and nine."}


@pytest.mark.parametrize("answer", ["18", "#### eighteen", "#### 18 apples"])
def test_an_answer_without_a_number_at_its_end_is_refused(rows, answer: str) -> None:
    with pytest.raises(DataError) as caught:
        read_gsm8k(rows({"question": "How many?", "answer": answer}), split="test")
    assert caught.value.expected == "an answer that ends in #### and a number"


def test_the_training_split_needs_its_file(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"question": "a", "answer": "#### 1"}', encoding="utf-8")
    assert len(load_set("gsm8k", data=tmp_path).items) == 1
    with pytest.raises(ConfigError, match="'split' is not a known choice") as caught:
        load_set("gsm8k", data=tmp_path, split="train")
    assert caught.value.expected == "one of test"


def test_the_published_files_have_the_published_counts(published) -> None:
    """7,473 and 1,319 problems: the files of the official repository of arXiv 2110.14168."""
    assert len(published("gsm8k").items) == 1319
    assert len(published("gsm8k", split="train").items) == 7473
