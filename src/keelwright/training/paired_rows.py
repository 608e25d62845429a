# SPDX-License-Identifier: Apache-2.0
"""Two feeds that answer the same requests: which row of one belongs to which of the other."""

from __future__ import annotations

from collections import defaultdict, deque

from keelwright.core.errors import DataError
from keelwright.training.feeds import Feeds
from keelwright.training.rows import EncodedRow


def partners(feeds: Feeds, feed: str, other: str) -> list[int]:
    """Return, for each row of `feed`, which row of `other` has the same prompt; the k-th of equal prompts the k-th.

    Args:
        feeds: Encoded rows of a run.
        feed: Whose rows are drawn.
        other: Whose rows are looked up.

    Raises:
        DataError: A row has no partner: it was too long and left out.
    """
    waiting: defaultdict[tuple[int, ...], deque[int]] = defaultdict(deque)
    for index, row in enumerate(feeds.feeds[other].rows):
        waiting[prompt_of(row)].append(index)
    found: list[int] = []
    for number, row in enumerate(feeds.feeds[feed].rows, 1):
        same = waiting[prompt_of(row)]
        if not same:
            raise DataError(
                f"Row {number} of '{feed}' has no partner among the '{other}' rows.",
                expected="both answers to every request",
                found="a request with one: the other was too long for the model and was left out",
                fix="set too_long to 'cut', or shorten the answers",
            )
        found.append(same.popleft())
    return found


def slots(feeds: Feeds, feed: str) -> list[list[int]]:
    """Return, for each micro-batch of this process, the places of its rows in a draw of the whole run."""
    mine = range(feeds.feeds[feed].batch_size)[feeds.process :: feeds.processes]
    return [list(mine[part :: feeds.accumulate]) for part in range(feeds.accumulate)]


def prompt_of(row: EncodedRow) -> tuple[int, ...]:
    """Return the token ids of a row's prompt."""
    return tuple(row.ids[: row.prompt_tokens].tolist())
