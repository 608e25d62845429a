# SPDX-License-Identifier: Apache-2.0
"""Gradients at shifted activations: hidden states moved towards more loss, or by noise, while weights stay.

`ActivationShift` takes two passes. The first takes the loss's gradient at the outputs of the sites, over all
micro-batches and without gradients of weights; the second adds the normalised gradient there as a constant, and takes
the gradient of the weights. `ActivationNoise` takes one pass. Padding is never moved.

The gradient is that of the whole step: one norm over sites, rows, tokens, micro-batches and processes, so a step in
parts is the step on the whole batch. Where activations are computed again in the backward pass, the hooks fire again
and move them by the same amount.

Memory: one tensor `[batch, tokens, d_model]` per site and micro-batch.
Limits: with `gradient_checkpointing` the loss may call the model once per micro-batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.nn import Module

from keelwright.core.config import require_in_range
from keelwright.core.errors import ConfigError
from keelwright.core.seeds import generator
from keelwright.training.sites import Sites, attention_outputs

if TYPE_CHECKING:
    from keelwright.training.composer import GradientComposer, Taken
    from keelwright.training.losses import Loss
    from keelwright.training.terms import Per, Term

Key = tuple[int, str, int]
"""Micro-batch, site, and which of the site's outputs in that micro-batch."""

_EPS: Final = 1e-7
"""Added to the norm, as in Vaccine's official code."""


@dataclass(frozen=True, slots=True)
class ActivationShift:
    """Outputs of the sites moved along the gradient of the term's own loss: `h_l + size * G_l / (||G|| + eps)`.

    Source:
        Vaccine (arXiv 2402.01109, Eq. 4) and T-Vaccine (arXiv 2410.09760), with `size = rho`.
    """

    size: float
    """Length of the whole shift over sites, rows and tokens, in units of the activations; above 0 it climbs."""
    layers: tuple[int, ...] | None = None
    """Which of the sites, counted from 0; None: all."""
    sites: Sites = attention_outputs
    """Finds the modules whose outputs are moved."""

    def gradient(self, composer: GradientComposer, term: Term) -> Taken:
        """Return the gradient of the same rows at the moved activations."""
        places = _chosen(self.sites(composer.model), self.layers)
        found = activation_gradients(composer, term.loss, term.feed, places, per=term.per)
        scale = self.size / (float(found.norm) + _EPS)

        def moved(key: Key, hidden: Tensor, kept: Tensor | None, rows: list[int]) -> Tensor:
            # A site in a branch that this loss does not reach has no gradient.
            along = found.gradients.get(key)
            return hidden if along is None else hidden + (scale * along.float()).to(hidden.dtype)

        with closing(_passes(composer, term.loss, term.feed, places, moved, per=term.per)) as shares:
            return composer.harvest(shares)


@dataclass(frozen=True, slots=True)
class ActivationNoise:
    """Outputs of the sites with noise: `h_l + e_l`, `e_l ~ sqrt(variance) * N(0, I)`.

    Each row has noise of its own, keyed by the step and its place in the draw.

    Source:
        The random variant in Vaccine's official code (git-disl/Vaccine), with `variance = rho`.
    """

    variance: float
    """Of each entry, squared units of the activations; 0 or more."""
    seed: int = 0
    layers: tuple[int, ...] | None = None
    """Which of the sites, counted from 0; None: all."""
    sites: Sites = attention_outputs
    """Finds the modules whose outputs are moved."""

    def gradient(self, composer: GradientComposer, term: Term) -> Taken:
        """Return the gradient of the same rows at the moved activations."""
        places = _chosen(self.sites(composer.model), self.layers)

        def moved(key: Key, hidden: Tensor, kept: Tensor | None, rows: list[int]) -> Tensor:
            real = torch.ones(hidden.shape[:2]) if kept is None else kept.cpu()
            noise = torch.zeros(hidden.shape)
            for row in range(len(hidden)):
                # A loss may call the model with more than one variant of each row.
                variant, place = row // len(rows), rows[row % len(rows)]
                source = generator(self.seed, "training", "noise", composer.step, place, variant, *key[1:])
                tokens = real[row].bool()
                noise[row, tokens] = torch.randn(int(tokens.sum()), hidden.shape[-1], generator=source)
            return hidden + (noise * self.variance**0.5).to(hidden.device, hidden.dtype)

        with closing(_passes(composer, term.loss, term.feed, places, moved, per=term.per)) as shares:
            return composer.harvest(shares)


@dataclass(frozen=True, slots=True)
class ActivationGradients:
    """The gradient of a step's mean loss at the outputs of the sites."""

    gradients: Mapping[Key, Tensor]
    """This process's. Shape `[batch, tokens, d_model]` each; 0 at padding."""
    norms: Tensor
    """L2 norm per site over rows, tokens, micro-batches and processes, float32. Shape `[sites]`."""

    @property
    def norm(self) -> Tensor:
        """L2 norm over all sites. Shape `[]`."""
        return self.norms.square().sum().sqrt()


def activation_gradients(
    composer: GradientComposer,
    loss: Loss,
    feed: str,
    sites: Mapping[str, Module],
    *,
    per: Per = "token",
    draw: int | None = None,
) -> ActivationGradients:
    """Return the gradient of a loss at the outputs of modules; gradients of weights are not taken.

    Args:
        composer: Of the run, at the weights.
        loss: Sum over a micro-batch.
        feed: Which rows.
        sites: Modules of the model by name.
        per: What the sum is divided by.
        draw: Which of the feed's draws; by default the step's.
    """
    outputs: dict[Key, tuple[Tensor, Tensor | None]] = {}

    def watched(key: Key, hidden: Tensor, kept: Tensor | None, rows: list[int]) -> Tensor:
        # Below the first weight that is trained nothing asks for a gradient.
        hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        # Where activations are computed again, the outputs of the first time are the ones in the graph.
        outputs.setdefault(key, (hidden, kept))
        return hidden

    found: dict[Key, Tensor] = {}
    squares = torch.zeros(len(sites), device=composer.feeds.device)
    places = {name: place for place, name in enumerate(sites)}
    with closing(_passes(composer, loss, feed, sites, watched, per=per, draw=draw)) as shares:
        for share in shares:
            hidden = [one for one, _ in outputs.values()]
            taken: Sequence[Tensor | None] = torch.autograd.grad(share, hidden, allow_unused=True) if hidden else ()
            for (key, (_, kept)), one in zip(outputs.items(), taken, strict=True):
                if one is not None:
                    found[key] = one if kept is None else one * kept.to(one.dtype)[:, :, None]
                    squares[places[key[1]]] += found[key].float().square().sum()
            outputs.clear()
    return ActivationGradients(found, composer.processes.sum(squares).sqrt())


Change = Callable[[Key, Tensor, Tensor | None, list[int]], Tensor]
"""Returns what a site passes on: of its key, its output, the mask of real tokens, and the rows' places in the draw."""


def _passes(
    composer: GradientComposer,
    loss: Loss,
    feed: str,
    sites: Mapping[str, Module],
    change: Change,
    *,
    per: Per,
    draw: int | None = None,
) -> Generator[Tensor, None, None]:
    """Yield each micro-batch's share of the mean loss with the sites' outputs changed."""
    feeds, draw = composer.feeds, composer.step if draw is None else draw
    count = feeds.count(feed, draw, per=per)
    for part, batch in enumerate(feeds.batches(feed, draw)):
        first, apart = feeds.process + feeds.processes * part, feeds.processes * feeds.accumulate
        taps = _Taps(part, [first + apart * row for row in range(len(batch.rows))], change)
        with taps.on(composer.model, sites):
            share = composer.forward(loss, batch, key=(feed, draw, part)) / count
            taps.is_forward = False
            # The backward pass follows here: with checkpointed activations the hooks fire again.
            yield share


class _Taps:
    """Hooks on the sites during one micro-batch."""

    def __init__(self, part: int, rows: list[int], change: Change) -> None:
        self.is_forward = True
        self._part, self._rows, self._change = part, rows, change
        self._calls: Counter[str] = Counter()
        self._mask: Tensor | None = None

    @contextmanager
    def on(self, model: Module, sites: Mapping[str, Module]) -> Iterator[None]:
        """Keep the hooks on for a while."""
        handles: list[Any] = [model.register_forward_pre_hook(self._see, with_kwargs=True)]
        handles += [site.register_forward_hook(partial(self._tap, name)) for name, site in sites.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, model: Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        mask = named.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _tap(self, name: str, site: Module, inputs: tuple[Any, ...], output: Any) -> Any:
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        number = self._number(name)
        changed = self._change((self._part, name, number), hidden, self._mask, self._rows)
        return (changed, *rest) if isinstance(output, tuple) else changed

    def _number(self, name: str) -> int:
        """Return which of the site's outputs this is."""
        if self.is_forward:
            self._calls[name] += 1
            return self._calls[name] - 1
        if self._calls[name] > 1:
            raise ConfigError(
                "Activations that are computed again cannot be told apart.",
                expected="a loss that calls the model once, where activations are shifted and checkpointed",
                found=f"{self._calls[name]} calls of '{name}' in one micro-batch",
                fix="set gradient_checkpointing to false",
            )
        return 0


def _chosen(sites: Mapping[str, Module], layers: tuple[int, ...] | None) -> dict[str, Module]:
    for layer in layers or ():
        require_in_range("layers", layer, low=0, high=len(sites) - 1)
    return {name: site for index, (name, site) in enumerate(sites.items()) if layers is None or index in layers}
