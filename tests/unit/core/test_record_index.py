# SPDX-License-Identifier: Apache-2.0
"""Records in memory."""

from __future__ import annotations

from typing import Any

from keelwright.core.record_index import RecordIndex
from keelwright.core.records import Judgement, Record


def record(item_id: str, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "item_id": item_id, "suite": "test", "suite_digest": "s", "kind": "harmful", "hazard": "theft",
        "prompt": "p", "model_id": "model", "revision": "r", "template_digest": "t", "decoding_digest": "d",
        "output": "text", "n_tokens": 1, "finish": "eos", "judgements": {"j": Judgement("refusal_full")},
    }  # fmt: skip
    return Record(**{**fields, **changes})


def test_an_index_finds_what_it_was_given_and_nothing_else() -> None:
    index = RecordIndex([record("h1")])
    index.append(record("h2"))
    index.append(record("h2", model_id="other"))
    assert [one.item_id for one in index.find("model", ["h2", "h3", "h1"])] == ["h2", "h1"]
    assert index.find("nobody", ["h1"]) == []
    assert len(index.records) == len(index) == 3


def test_the_newest_record_of_a_sample_wins_and_keeps_its_place() -> None:
    index = RecordIndex([record("h1", output="old"), record("h2")])
    index.append(record("h1", output="new"))
    assert [one.output for one in index.records] == ["new", "text"]


def test_the_samples_of_an_item_come_in_order() -> None:
    index = RecordIndex([record("h1", sample=sample, output=str(sample)) for sample in (2, 0, 1)])
    assert [one.output for one in index.find("model", ["h1"])] == ["0", "1", "2"]
