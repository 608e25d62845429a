# SPDX-License-Identifier: Apache-2.0
"""The reference model inside a loss: its log-probabilities and logits at the answer tokens, kept per row or asked anew.

Rows do not change in a run, and the reference does not either: what it says of a row is measured once, before the
first step, wherever it is small enough to be kept. Then full fine-tuning needs no copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keelwright.ops.divergence import CHUNK, Direction, divergence
from keelwright.training.losses import Forward
from keelwright.training.rows import IGNORED, Batch
from keelwright.training.setup import Setup

AtAnswers = Callable[[Batch], Tensor]
"""What the reference says at a batch's answer tokens, row after row. Shape `[answers]` or `[answers, vocab]`."""


def answer_logits(model: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits at the answer tokens, in the model's dtype, and the tokens.

    Returns:
        Shapes `[answers, vocab]` and `[answers]`; the rows of the batch one after another, without padding.
    """
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    targets = batch.labels[:, 1:]
    wanted = targets != IGNORED
    return output.logits[:, :-1][wanted], targets[wanted]


def answer_losses(model: Forward, batch: Batch) -> Tensor:
    """Return the cross entropy of each answer token, in nats and float32. Shape `[answers]`."""
    logits, targets = answer_logits(model, batch)
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def answer_places(batch: Batch) -> Tensor:
    """Return which token of its row's answer each answer token is, counted from 0. Shape `[answers]`."""
    wanted = batch.labels[:, 1:] != IGNORED
    return (wanted.cumsum(1) - 1)[wanted]


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Values at the answer tokens of every row of a feed."""

    rows: Sequence[Tensor]
    """By place in the feed; the first axis runs over the row's answer tokens."""

    def __call__(self, batch: Batch) -> Tensor:
        """Return the values of a batch's rows, one row after another."""
        return torch.cat([self.rows[index] for index in batch.rows.tolist()])


def kept_logprobs(setup: Setup, feed: str) -> Kept:
    """Return the starting model's log-probability of every answer token of a feed, in nats.

    Cost: one forward pass over the feed in each process; 4 bytes per answer token.
    """
    return _kept(setup, feed, lambda model, batch: -answer_losses(model, batch))


def reference_logits(setup: Setup, feeds: Sequence[str], *, cache_mb: int) -> dict[str, AtAnswers]:
    """Return the starting model's logits at the answer tokens, by feed.

    Args:
        setup: The run before its first step.
        feeds: Whose rows are asked about.
        cache_mb: Feeds whose logits take at most so many MiB are asked once and kept whole, which is exact; the others
            are asked at each step: of the model with its adapter off, or of a copy where there is none.
    """
    small = [feed for feed in feeds if _logit_bytes(setup, feed) <= cache_mb * 2**20]
    found: dict[str, AtAnswers] = {
        feed: _kept(setup, feed, lambda model, batch: answer_logits(model, batch)[0]) for feed in small
    }
    if len(found) < len(set(feeds)):
        reference = setup.reference()
        for feed in set(feeds) - set(small):
            found[feed] = lambda batch: answer_logits(reference, batch)[0]
    return found


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceDivergence:
    """The KL divergence between the reference and the model at the answer tokens, as a loss (nats)."""

    reference: AtAnswers
    """Logits. Shape `[answers, vocab]`."""
    direction: Direction = "forward"
    chunk: int = CHUNK

    def __call__(self, model: Forward, batch: Batch) -> Tensor:
        """Return the sum over the answer tokens of a micro-batch."""
        reference = self.reference(batch)
        logits, _ = answer_logits(model, batch)
        return divergence(logits, reference, direction=self.direction, chunk=self.chunk).sum()


@dataclass(frozen=True, slots=True, eq=False)
class AnswersAndDivergence:
    """Cross entropy and `beta` times the divergence on the same rows, from one forward pass."""

    divergence: ReferenceDivergence
    beta: float

    def __call__(self, model: Forward, batch: Batch) -> Tensor:
        """Return the sum over the answer tokens of a micro-batch."""
        ours = self.divergence
        reference = ours.reference(batch)
        logits, targets = answer_logits(model, batch)
        loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return loss + self.beta * divergence(logits, reference, direction=ours.direction, chunk=ours.chunk).sum()


def _kept(setup: Setup, feed: str, measure: Callable[[Forward, Batch], Tensor]) -> Kept:
    model, rows = setup.live(), []
    for batch in setup.all_batches(feed):
        # Through the composer: in the precision that the steps will have.
        values = setup.composer.forward(lambda _, one: measure(model, one), batch)
        rows.extend(values.split([setup.feeds.feeds[feed].rows[index].answer_tokens for index in batch.rows.tolist()]))
    return Kept([one.clone() for one in rows])


def _logit_bytes(setup: Setup, feed: str) -> int:
    """Return how much memory a feed's logits take, at 4 bytes each."""
    vocabulary = setup.module.get_input_embeddings().weight.shape[0]
    return 4 * int(vocabulary) * sum(row.answer_tokens for row in setup.feeds.feeds[feed].rows)
