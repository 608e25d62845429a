# SPDX-License-Identifier: Apache-2.0
"""Named rows of a training run, and the micro-batches that each step draws from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from keelwright.core.errors import ConfigError
from keelwright.core.seeds import derive_seed
from keelwright.training.rows import Batch, EncodedRow, batch_indices, batch_of


@dataclass(frozen=True, slots=True)
class EncodedFeed:
    """Rows of one feed as token ids."""

    rows: Sequence[EncodedRow]
    batch_size: int
    """Rows per draw over all processes and micro-batches."""
    seed: int
    """Of their order."""


@dataclass(frozen=True, slots=True)
class Feeds:
    """All feeds of a run, seen from one process.

    A draw is a number: the step for most methods, more than one per step for those that train within a step. What a
    draw holds is a pure function of the feed's seed and the number, so that a resumed run draws the same.
    """

    feeds: Mapping[str, EncodedFeed]
    pad_id: int
    device: torch.device
    accumulate: int = 1
    process: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        least = self.accumulate * self.processes
        for name, feed in self.feeds.items():
            if feed.batch_size < least:
                raise ConfigError(
                    f"The batch of '{name}' rows is too small to be split.",
                    expected=f"'batch_size' of at least {least}: {self.processes} processes x {self.accumulate} parts",
                    found=str(feed.batch_size),
                    fix="raise 'batch_size', lower 'accumulate', or launch fewer processes",
                )

    def indices(self, feed: str, draw: int) -> list[int]:
        """Return the rows of a draw over all processes."""
        one = self.feeds[feed]
        return batch_indices(len(one.rows), one.batch_size, draw, seed=one.seed)

    def count(self, feed: str, draw: int, *, per: str) -> int:
        """Return what the loss of a draw is divided by: its answer tokens, or its rows, over all processes."""
        picked = self.indices(feed, draw)
        if per == "row":
            return len(picked)
        return sum(self.feeds[feed].rows[index].answer_tokens for index in picked)

    def batches(self, feed: str, draw: int) -> list[Batch]:
        """Return the micro-batches of a draw that are this process's."""
        mine = self.indices(feed, draw)[self.process :: self.processes]
        return [self.batch(feed, mine[part :: self.accumulate]) for part in range(self.accumulate)]

    def batch(self, feed: str, indices: Sequence[int]) -> Batch:
        """Return the named rows of a feed as one batch."""
        rows = self.feeds[feed].rows
        return batch_of([rows[index] for index in indices], pad_id=self.pad_id, indices=indices).to(self.device)


def feed_seed(seed: int, name: str, *, first: bool) -> int:
    """Return the seed of a feed's order. The first feed has the run's own, so that no defence moves the user's rows."""
    return seed if first else derive_seed(seed, "training", "feed", name)
