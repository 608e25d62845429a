# SPDX-License-Identifier: Apache-2.0
"""When the next request may leave: rates per minute, pauses that a server asks for, and waits between attempts.

A rate is kept as a token bucket that holds one request: a request takes its turn on a schedule that moves on by the
request's own share of a minute. So a rate holds over any stretch of time, not only over whole minutes, and a turn that
was taken late does not push back the ones after it.
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import time
from collections.abc import Callable

LONGEST_BACKOFF_S = 60.0
"""No wait between two attempts of one request is longer, unless the server asks for it."""


class Rate:
    """A schedule that gives out at most so many units per minute.

    Args:
        per_minute: Units per minute; None is no limit.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._seconds_each = 60.0 / per_minute if per_minute else 0.0
        self._free_at = 0.0

    def turn(self, now: float, units: float) -> float:
        """Return when these units may be used, and keep the time that they take.

        Args:
            now: Seconds of a steady clock.
            units: Requests or tokens.
        """
        at = max(now, self._free_at)
        self._free_at = at + units * self._seconds_each
        return at

    def settle(self, units: float) -> None:
        """Correct the schedule by the units that were used beyond those announced; below 0 where it was fewer."""
        self._free_at += units * self._seconds_each


class Pacer:
    """Holds requests back until the rates allow them and no pause is on."""

    def __init__(
        self,
        *,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests, self._tokens = Rate(requests_per_minute), Rate(tokens_per_minute)
        self._clock = clock
        self._paused_until = 0.0

    async def wait(self, tokens: float) -> None:
        """Wait for the turn of one request that takes about so many tokens."""
        now = self._clock()
        at = max(self._requests.turn(now, 1), self._tokens.turn(now, tokens))
        while (seconds := max(at, self._paused_until) - self._clock()) > 0:
            await asyncio.sleep(seconds)

    def pause(self, seconds: float) -> None:
        """Let no request leave for so long: the server said that it is asked too often."""
        self._paused_until = max(self._paused_until, self._clock() + seconds)

    def settle(self, tokens: float) -> None:
        """Tell how many more tokens a request took than it was thought to; below 0 where it was fewer."""
        self._tokens.settle(tokens)


def backoff(attempt: int, *, base_s: float, draw: float) -> float:
    """Return how long to wait after a failed attempt, in seconds: exponential, with full jitter.

    Args:
        attempt: Which attempt failed, from 0.
        base_s: Longest wait after the first.
        draw: Uniform in 0..1.

    Source:
        Exponential Backoff And Jitter, AWS Architecture Blog, 2015: "full jitter".
    """
    return draw * min(LONGEST_BACKOFF_S, base_s * 2.0**attempt)


def retry_after(value: str | None, *, now: datetime.datetime) -> float | None:
    """Return the seconds that a `Retry-After` header asks for; None where there is none that can be read.

    Args:
        value: Seconds, or an HTTP date.
        now: With a time zone.

    Source:
        RFC 9110, section 10.2.3.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (email.utils.parsedate_to_datetime(value) - now).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None
