# SPDX-License-Identifier: Apache-2.0
"""Rates hold over any stretch of time, pauses hold for all, waits between attempts grow and are spread."""

from __future__ import annotations

import asyncio
import datetime
import itertools

import pytest

from keelwright.models.engines.pacing import LONGEST_BACKOFF_S, Pacer, Rate, backoff, retry_after

NOW = datetime.datetime(2026, 1, 1, 12, 0, 0, tzinfo=datetime.UTC)


def test_turns_are_spread_over_the_minute():
    rate = Rate(60)
    assert [rate.turn(100.0, 1) for _ in range(4)] == [100.0, 101.0, 102.0, 103.0]


def test_no_stretch_of_time_holds_more_than_its_share_however_late_the_turns_are_asked_for():
    rate = Rate(120)
    turns = [rate.turn(now, 1) for now in (0.0, 0.0, 5.0, 5.0, 5.0, 5.1, 30.0, 30.0)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(turns)]
    assert min(gaps) == pytest.approx(0.5)
    assert turns[2] == 5.0


def test_no_limit_never_waits():
    rate = Rate(None)
    assert [rate.turn(7.0, 1000) for _ in range(3)] == [7.0, 7.0, 7.0]


def test_tokens_that_were_not_used_are_given_back():
    spent, saved = Rate(600), Rate(600)
    for rate in (spent, saved):
        rate.turn(0.0, 100)
    saved.settle(-60)
    assert spent.turn(0.0, 1) == pytest.approx(10.0)
    assert saved.turn(0.0, 1) == pytest.approx(4.0)


def test_a_pause_holds_back_those_that_already_wait():
    async def scene() -> float:
        loop = asyncio.get_running_loop()
        pacer = Pacer(requests_per_minute=1200, tokens_per_minute=None)
        await pacer.wait(0)
        start = loop.time()
        waiting = asyncio.create_task(pacer.wait(0))
        await asyncio.sleep(0.01)
        pacer.pause(0.2)
        await waiting
        return loop.time() - start

    assert asyncio.run(scene()) >= 0.2


def test_waits_double_up_to_a_limit_and_are_drawn_from_the_whole_range():
    assert [backoff(attempt, base_s=1.0, draw=1.0) for attempt in (0, 1, 2, 20)] == [1.0, 2.0, 4.0, LONGEST_BACKOFF_S]
    assert backoff(3, base_s=1.0, draw=0.25) == 2.0
    assert backoff(3, base_s=1.0, draw=0.0) == 0.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("Thu, 01 Jan 2026 12:00:30 GMT", 30.0),
        ("Thu, 01 Jan 2026 11:00:00 GMT", 0.0),
        ("-3", 0.0),
        ("soon", None),
        ("inf", None),
        ("nan", None),
        (None, None),
    ],
)
def test_the_header_retry_after_is_seconds_or_a_date(value, seconds):
    assert retry_after(value, now=NOW) == seconds
