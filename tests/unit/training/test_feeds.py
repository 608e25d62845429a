# SPDX-License-Identifier: Apache-2.0
"""What a draw holds, and how it is split over processes and micro-batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from keelwright.core.errors import ConfigError
from keelwright.training.feeds import EncodedFeed, Feeds, feed_seed
from keelwright.training.rows import EncodedRow

ROWS = [EncodedRow(torch.arange(1, 4 + length), 2) for length in (1, 2, 3, 4, 5)]
"""Two tokens of prompt; 2 to 6 of answer."""


def _feeds(batch_size: int = 4, **settings: int) -> Feeds:
    return Feeds({"user": EncodedFeed(ROWS, batch_size, seed=3)}, pad_id=0, device=torch.device("cpu"), **settings)


def test_the_same_draw_holds_the_same_rows() -> None:
    assert _feeds().indices("user", 7) == _feeds().indices("user", 7)
    assert _feeds().indices("user", 7) != _feeds().indices("user", 8)


def test_draws_go_through_every_row_before_any_comes_again() -> None:
    found = [index for draw in range(5) for index in _feeds().indices("user", draw)]
    assert [sorted(found[start : start + 5]) for start in range(0, 20, 5)] == [[0, 1, 2, 3, 4]] * 4


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (3, 1)])
def test_processes_and_parts_share_a_draw_without_loss_or_overlap(processes: int, accumulate: int) -> None:
    whole = _feeds()
    found: list[int] = []
    for process in range(processes):
        feeds = _feeds(process=process, processes=processes, accumulate=accumulate)
        parts = feeds.batches("user", 2)
        assert len(parts) == accumulate
        found += [row for part in parts for row in part.rows.tolist()]
        assert feeds.count("user", 2, per="token") == whole.count("user", 2, per="token")
    assert sorted(found) == sorted(whole.indices("user", 2))


def test_counts_are_answer_tokens_or_rows_of_the_whole_draw() -> None:
    feeds = _feeds()
    batch = feeds.batches("user", 0)[0]
    assert feeds.count("user", 0, per="token") == int((batch.labels != -100).sum())
    assert feeds.count("user", 0, per="row") == 4


def test_a_batch_names_the_place_of_each_row_in_its_feed() -> None:
    batch = _feeds().batch("user", [4, 1])
    assert batch.rows.tolist() == [4, 1]
    assert batch.attention_mask.sum(dim=1).tolist() == [len(ROWS[4].ids), len(ROWS[1].ids)]


def test_a_batch_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch of 'user' rows is too small(?s:.)*at least 6: 2 processes x 3 parts"):
        _feeds(accumulate=3, processes=2)


def test_the_first_feed_keeps_the_order_of_plain_tuning_and_others_have_their_own() -> None:
    assert feed_seed(5, "user", first=True) == 5
    assert feed_seed(5, "harmful", first=False) != feed_seed(5, "safety", first=False) != 5
    other = replace(_feeds(), feeds={"user": EncodedFeed(ROWS, 4, seed=4)})
    assert [other.indices("user", draw) for draw in range(3)] != [_feeds().indices("user", draw) for draw in range(3)]
