# SPDX-License-Identifier: Apache-2.0
"""Asynchronous work hands its results to the caller's thread, and stops with it."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from keelwright.models.engines.background import stream


async def count_to_five(put):
    for number in range(5):
        put(number)
        await asyncio.sleep(0)


def test_everything_that_was_handed_over_arrives_in_order():
    assert [piece for pieces in stream(count_to_five) for piece in pieces] == list(range(5))


def test_an_error_comes_after_what_was_handed_over_before_it():
    async def work(put):
        put("before")
        raise ValueError("the work failed")

    arrived = []
    with pytest.raises(ValueError, match="the work failed"):
        for pieces in stream(work):
            arrived += pieces
    assert arrived == ["before"]


def test_closing_the_iteration_cancels_the_work_and_ends_its_thread():
    cancelled = threading.Event()

    async def work(put):
        put("first")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    before = threading.active_count()
    with contextlib.closing(stream(work)) as pieces:
        assert next(pieces) == ["first"]
    assert cancelled.is_set()
    assert threading.active_count() == before


def test_it_works_inside_a_running_event_loop_as_in_a_notebook():
    async def cell():
        return [piece for pieces in stream(count_to_five) for piece in pieces]

    assert asyncio.run(cell()) == list(range(5))


def test_what_the_caller_does_with_a_piece_may_itself_stream():
    outer = [[piece for inner in stream(count_to_five) for piece in inner] for _ in stream(count_to_five)]
    assert outer
    assert all(inner == list(range(5)) for inner in outer)
