# SPDX-License-Identifier: Apache-2.0
"""A term's gradient along a tuning that an adversary would do: first order, the weights as before afterwards.

    G = (1/n) sum over n runs, sum over k with (k + 1) mod s = 0 of exp(lambda (k - (K - 1))) * grad L(w_k)
    w_k: the weights after k + 1 steps of AdamW on the adversary's rows, k = 0..K-1

The derivative of w_k with respect to w is taken as the identity. Every run starts at the same weights with a fresh
optimiser and a learning rate of its own; the term's rows are drawn once per run.

Source:
    Tamper-Resistant Safeguards for Open-Weight LLMs, arXiv 2408.00761, Algorithm 1 and its schedule; official code
    rishub-tamirisa/tamper-resistance.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from keelwright.core.seeds import derive_seed, generator
from keelwright.ops.gradients import Gradient, add_scaled
from keelwright.training.composer import GradientComposer, Taken
from keelwright.training.losses import Loss, answer_loss

if TYPE_CHECKING:
    from keelwright.training.terms import Term


@dataclass(frozen=True, slots=True)
class InnerTraining:
    """The places that an adversary's AdamW passes on the way from the weights."""

    feed: str
    """The adversary's rows."""
    steps: int
    """K, at least 1."""
    every: int = 1
    """s: the term's gradient is taken after every s-th step."""
    lrs: tuple[float, ...] = (2e-5,)
    """Each run draws one of these rates."""
    decay: float = 0.0
    """lambda: how much less the early places count; 0 counts all alike."""
    runs: int = 1
    """n: adversaries per step."""
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    before: str | None = None
    """Rows that some adversaries train on first: they retain, then forget."""
    before_share: float = 0.0
    """Share of the runs that do so."""
    before_beta: tuple[float, float] = (6.0, 3.0)
    """They switch after `M = floor(K * Beta(a, b))` steps."""
    loss: Loss = answer_loss
    """What the adversary descends."""
    seed: int = 0
    """Of rates and switches."""
    figures: MutableMapping[str, float] = field(default_factory=dict)
    """Takes the means over the runs: the adversary's first and last loss, the term's loss at the last place."""

    def gradient(self, composer: GradientComposer, term: Term) -> Taken:
        """Return the gradient summed over the places, and the losses there weighted in the same way."""
        total: Gradient = [None] * len(composer.weights)
        value = torch.zeros((), device=composer.feeds.device)
        measured = torch.zeros(3, device=composer.feeds.device)
        for run in range(self.runs):
            with composer.kept_weights():
                found, marks = self._run(composer, term, run)
            total = add_scaled(total, found.gradient)
            value = value + found.value
            measured = measured + marks / self.runs
        names = ("adversary loss at first", "adversary loss at last", f"{term.name} at last")
        self.figures.update(zip(names, composer.processes.sum(measured).tolist(), strict=True))
        return Taken(value, total)

    def weight_of(self, k: int) -> float:
        """Return the factor of the gradient after inner step `k`, counted from 0; 0 where none is taken."""
        if (k + 1) % self.every:
            return 0.0
        return math.exp(self.decay * (k - (self.steps - 1))) / self.runs

    def plan(self, step: int, run: int) -> tuple[float, int]:
        """Return a run's learning rate, and how many of its steps train on the rows `before`."""
        draw = generator(self.seed, "training", "inner", step, run)
        rate = self.lrs[int(torch.randint(len(self.lrs), (), generator=draw))]
        retains = self.before is not None and float(torch.rand((), generator=draw)) < self.before_share
        if not retains:
            return rate, 0
        # Two gamma variates make a beta one; torch's own sampler takes no generator, numpy's does.
        import numpy as np

        numbers = np.random.default_rng(derive_seed(self.seed, "training", "inner", "switch", step, run))
        return rate, int(self.steps * float(numbers.beta(*self.before_beta)))

    def _run(self, composer: GradientComposer, term: Term, run: int) -> tuple[Taken, torch.Tensor]:
        """Train from the weights as they are; whoever calls puts them back.

        Returns:
            The sum over the places, and this process's shares of the three figures.
        """
        weights, draw = composer.weights, composer.step * self.runs + run
        rate, retained = self.plan(composer.step, run)
        optimizer = torch.optim.AdamW(weights, lr=rate, betas=self.betas, weight_decay=self.weight_decay)
        total: Gradient = [None] * len(weights)
        value = torch.zeros((), device=composer.feeds.device)
        marks = torch.zeros(3, device=composer.feeds.device)
        for k in range(self.steps):
            rows = self.before if self.before is not None and k < retained else self.feed
            taken = composer.gradient(self.loss, rows, draw=draw * self.steps + k)
            # Not `composer.reduced`, which would hold every one of them until the step is done.
            taken = replace(taken, gradient=composer.processes.reduce(taken.gradient), reduced=True)
            for weight, one in zip(weights, taken.gradient, strict=True):
                weight.grad = None if one is None else one.to(weight.dtype)
            optimizer.step()
            optimizer.zero_grad()
            if k == 0:
                marks[0] = taken.value
            if k == self.steps - 1:
                marks[1] = taken.value
            factor = self.weight_of(k)
            if factor:
                place = composer.gradient(term.loss, term.feed, per=term.per, draw=draw)
                total = add_scaled(total, place.gradient, factor)
                value = value + factor * place.value
                marks[2] = place.value
        return Taken(value, total), marks
