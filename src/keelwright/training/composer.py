# SPDX-License-Identifier: Apache-2.0
"""The gradient composer: gradients of several losses, at the weights and beside them, added up to one step.

All of it is additive: a gradient is summed over micro-batches, then over processes, and only then is a norm taken or
a weight moved. So a step in four parts, or on four machines, is the step on the whole batch. Weights that were moved
are copied back, bit for bit. Within a step the gradient of a loss on a feed at the weights is taken once.

Gradients of weights in half precision are added up in float32: a method lives on the small difference of two.

Cost: one forward and one backward pass per different (loss, feed, place). Memory: one gradient more per term that
must be kept apart, and one copy of the trained weights while they are moved.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from keelwright.core.errors import ConfigError
from keelwright.core.seeds import derive_seed
from keelwright.ops.gradients import Gradient, add_scaled, scaled
from keelwright.training.feeds import Feeds
from keelwright.training.losses import Loss
from keelwright.training.processes import Processes, local
from keelwright.training.rows import Batch
from keelwright.training.terms import Objective, Per, Term, pulled


@dataclass(frozen=True, slots=True)
class Taken:
    """A loss and its gradient at one place."""

    value: Tensor
    """This process's share of the mean loss: the shares add up to it. Shape `[]`."""
    gradient: Gradient
    """One tensor per trained weight."""
    reduced: bool = False
    """Whether the gradient is summed over the processes."""


@dataclass(frozen=True, slots=True)
class Composed:
    """What one step descends."""

    gradient: Gradient
    losses: Mapping[str, float]
    """Mean loss of each term where it was taken, nats per token (or per row)."""


class GradientComposer:
    """Takes the gradients of an objective's terms.

    Args:
        model: What is called; on the device of the feeds' batches.
        weights: What is trained, by name.
        feeds: Where batches come from.
        processes: How gradients are summed.
        seed: Of dropout: every pass over the same rows drops the same units.
        autocast: Opens the precision of a forward pass.
    """

    def __init__(
        self,
        model: Module,
        weights: Mapping[str, Parameter],
        feeds: Feeds,
        processes: Processes,
        *,
        seed: int = 0,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self.feeds, self.processes = model, feeds, processes
        self.names = tuple(weights)
        self.weights = list(weights.values())
        self.step = 0
        self._seed, self._autocast = seed, autocast
        # Both hold only while a step is composed: what is taken before or after it may be taken at other weights.
        self._kept: dict[Hashable, Taken] | None = None
        self._sums: dict[int, tuple[Taken, Taken]] | None = None
        self._wanted: list[bool] | None = None
        self._copies: list[list[Tensor]] = []
        self._depth = 0

    def compose(self, objective: Objective, step: int) -> Composed:
        """Return the gradient of one step and the losses that it is made of.

        Raises:
            ConfigError: Every term has weight 0, or two have the same name.
        """
        self.step = step
        self._kept, self._sums = {}, {}
        try:
            terms = [term for term in objective.terms(step) if term.weight != 0.0]
            _require_terms(terms)
            names = objective.trained(step)
            self._wanted = None if names is None else [name in names for name in self.names]
            taken = {term.name: self.take(term) for term in terms}
            gradient = objective.combine(step, _Reduced(self, taken))
            if gradient is None:
                gradient = self._weighted(terms, taken)
        finally:
            self._kept, self._sums, self._wanted = None, None, None
        for anchor in objective.anchors(step):
            gradient = pulled(gradient, self.weights, anchor)
        shares = torch.stack([one.value.detach().float() for one in taken.values()])
        values = self.processes.sum(shares).tolist()
        return Composed(gradient, dict(zip(taken, values, strict=True)))

    def take(self, term: Term) -> Taken:
        """Return a term's loss and gradient at its place, not yet weighted."""
        if term.at is not None:
            return term.at.gradient(self, term)
        return self.gradient(term.loss, term.feed, per=term.per)

    def gradient(self, loss: Loss, feed: str, *, per: Per = "token", draw: int | None = None) -> Taken:
        """Return a loss and its gradient at the weights as they now are, summed over micro-batches.

        Args:
            loss: Sum over a micro-batch.
            feed: Which rows.
            per: What the sum is divided by.
            draw: Which of the feed's draws; by default the step's.
        """
        draw = self.step if draw is None else draw
        key = (loss, feed, per, draw)
        kept = None if self._depth else self._kept
        if kept is not None and key in kept:
            return kept[key]
        found = self.harvest(self.shares(loss, feed, per=per, draw=draw))
        if kept is not None:
            kept[key] = found
        return found

    def harvest(self, shares: Iterable[Tensor]) -> Taken:
        """Return the sum of shares of a loss and its gradient; each share's graph is gone before the next is made.

        Weights that the step does not change have none.
        """
        total: Gradient = [None] * len(self.weights)
        value = torch.zeros((), device=self.feeds.device)
        wanted = self._wanted or [True] * len(self.weights)
        asked = [weight for weight, is_wanted in zip(self.weights, wanted, strict=True) if is_wanted]
        for share in shares:
            found = iter(self.processes.gradient(share, asked) if asked else ())
            total = add_scaled(total, [next(found) if is_wanted else None for is_wanted in wanted])
            value = value + share.detach()
        return Taken(value, total)

    def shares(self, loss: Loss, feed: str, *, per: Per = "token", draw: int | None = None) -> Iterator[Tensor]:
        """Yield each micro-batch's share of the mean loss, with its graph; the shares of all processes add up to it."""
        draw = self.step if draw is None else draw
        count = self.feeds.count(feed, draw, per=per)
        for part, batch in enumerate(self.feeds.batches(feed, draw)):
            yield self.forward(loss, batch, key=(feed, draw, part)) / count

    def forward(self, loss: Loss, batch: Batch, *, key: Sequence[str | int] = ()) -> Tensor:
        """Return the loss of one micro-batch.

        Args:
            loss: Sum over the micro-batch.
            batch: On the model's device.
            key: Of dropout: equal keys drop equal units.
        """
        torch.manual_seed(derive_seed(self._seed, "training", "dropout", *key, self.feeds.process))
        with self._autocast():
            return loss(self.model, batch)

    def reduced(self, taken: Taken) -> Taken:
        """Return the same with its gradient summed over the processes; asked again, it is the sum from before."""
        if taken.reduced:
            return taken
        if self._sums is None:
            return replace(taken, gradient=self.processes.reduce(taken.gradient), reduced=True)
        if id(taken) not in self._sums:
            # The first of the pair is held so that no other gradient gets its id.
            found = replace(taken, gradient=self.processes.reduce(taken.gradient), reduced=True)
            self._sums[id(taken)] = (taken, found)
        return self._sums[id(taken)][1]

    def norm(self, gradient: Gradient) -> Tensor:
        """Return the L2 norm of a reduced gradient over all trained weights, in float32. Shape `[]`."""
        return self.processes.norm(gradient)

    @contextmanager
    def moved(self, by: Sequence[Tensor | None]) -> Iterator[None]:
        """Add tensors to the weights for a while; afterwards they are what they were, bit for bit."""
        with self.kept_weights():
            pairs = [(weight, one) for weight, one in zip(self.weights, by, strict=True) if one is not None]
            with torch.no_grad():
                torch._foreach_add_([weight for weight, _ in pairs], [one.to(weight.dtype) for weight, one in pairs])
            yield

    @contextmanager
    def kept_weights(self) -> Iterator[list[Tensor]]:
        """Copy the weights back at the end, whatever was done to them; yields the copies."""
        if len(self._copies) == self._depth:
            self._copies.append([weight.detach().clone() for weight in self.weights])
        else:
            _copy(self._copies[self._depth], self.weights)
        copies = self._copies[self._depth]
        self._depth += 1
        try:
            yield copies
        finally:
            self._depth -= 1
            _copy(self.weights, copies)

    def _weighted(self, terms: Sequence[Term], taken: Mapping[str, Taken]) -> Gradient:
        """Return the weighted sum; what is not summed over the processes yet is summed once."""
        none: Gradient = [None] * len(self.weights)
        ours, all_ = none, none
        for term in terms:
            # A shift, or the objective, may have reduced it after this term took it.
            one = self._latest(taken[term.name])
            part = scaled(one.gradient, float(term.weight))
            if one.reduced:
                all_ = add_scaled(all_, part)
            else:
                ours = add_scaled(ours, part)
        if ours is not none:
            all_ = add_scaled(self.processes.reduce(ours), all_)
        return all_

    def _latest(self, taken: Taken) -> Taken:
        return taken if self._sums is None or id(taken) not in self._sums else self._sums[id(taken)][1]


class _Reduced(Mapping[str, Gradient]):
    """The terms' gradients by name, summed over the processes when they are asked for."""

    def __init__(self, composer: GradientComposer, taken: Mapping[str, Taken]) -> None:
        self._composer, self._taken = composer, taken

    def __getitem__(self, name: str) -> Gradient:
        return self._composer.reduced(self._taken[name]).gradient

    def __iter__(self) -> Iterator[str]:
        return iter(self._taken)

    def __len__(self) -> int:
        return len(self._taken)


def _copy(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    # By parts: torch has no fused copy of weights that are spread over processes.
    torch._foreach_copy_([local(one) for one in to], [local(one) for one in values])


def _require_terms(terms: Sequence[Term]) -> None:
    names = [term.name for term in terms]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            "A training step needs terms with names of their own.",
            expected="at least one term whose weight is not 0, no name twice",
            found=", ".join(names) or "no term",
            fix="change the weights or the names of the objective's terms",
        )
