# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from keelwright.core.errors import DataError
from keelwright.training.feeds import EncodedFeed, Feeds
from keelwright.training.paired_rows import partners, slots
from keelwright.training.rows import EncodedRow


def _row(prompt: int, answer: int) -> EncodedRow:
    return EncodedRow(torch.tensor([1, prompt, answer]), 2)


def _feeds(first: list[EncodedRow], second: list[EncodedRow], **settings: int) -> Feeds:
    feeds = {"first": EncodedFeed(first, 7, 0), "second": EncodedFeed(second, 7, 1)}
    return Feeds(feeds, pad_id=0, device=torch.device("cpu"), **settings)


def test_rows_are_paired_by_prompt_and_equal_prompts_in_order() -> None:
    first = [_row(5, 10), _row(6, 11), _row(5, 12)]
    second = [_row(6, 20), _row(5, 21), _row(7, 22), _row(5, 23)]
    assert partners(_feeds(first, second), "first", "second") == [1, 0, 3]


def test_a_row_without_a_partner_is_told() -> None:
    with pytest.raises(DataError, match="Row 2 of 'first' has no partner among the 'second' rows") as error:
        partners(_feeds([_row(5, 1), _row(8, 1)], [_row(5, 2)]), "first", "second")
    assert "set too_long to 'cut'" in str(error.value)


@pytest.mark.parametrize(("accumulate", "processes"), [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_places_are_those_of_the_batches(accumulate: int, processes: int) -> None:
    rows = [_row(number, 1) for number in range(2, 20)]
    seen = []
    for process in range(processes):
        feeds = _feeds(rows, rows, accumulate=accumulate, process=process, processes=processes)
        drawn = feeds.indices("first", 3)
        for batch, places in zip(feeds.batches("first", 3), slots(feeds, "first"), strict=True):
            assert batch.rows.tolist() == [drawn[place] for place in places]
            seen += places
    assert sorted(seen) == list(range(7))
