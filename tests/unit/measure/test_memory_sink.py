# SPDX-License-Identifier: Apache-2.0
"""Records in memory."""

from __future__ import annotations

from collections.abc import Callable

from keelwright.core.records import Record
from keelwright.measure.memory_sink import ListSink


def test_a_sink_finds_what_it_was_given_and_nothing_else(record: Callable[..., Record]) -> None:
    sink = ListSink([record("h1")])
    sink.append(record("h2"))
    sink.append(record("h2", model_id="other"))
    assert [one.item_id for one in sink.find("model", ["h2", "h3", "h1"])] == ["h2", "h1"]
    assert sink.find("nobody", ["h1"]) == []
    assert len(sink.records) == 3


def test_the_newest_record_of_an_item_wins(record: Callable[..., Record]) -> None:
    sink = ListSink([record("h1", output="old")])
    sink.append(record("h1", output="new"))
    assert [one.output for one in sink.records] == ["new"]
