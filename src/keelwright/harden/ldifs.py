# SPDX-License-Identifier: Apache-2.0
"""LDIFS: learn the user's rows while the features of several layers stay near the aligned model's.

For whoever controls the user's run and has no safety rows: features are compared on the user's own rows. A
reconstruction for language models of a method made for vision models.

Source:
    Fine-tuning can cripple your foundation model; preserving features may be the solution, arXiv 2308.13320 (not read;
    second hand). A port to language models that was read: git-disl/Booster.

Equation:
    L = u + lambda * sum_l mean_{t, d} (phi_l(x; w) - phi_l(x; w0))^2

    | symbol | name |
    |---|---|
    | u | cross entropy of the user's rows |
    | lambda | `lambda_` |
    | phi_l | hidden state after block l, for every `every`-th l and the last one, at all tokens that are not padding |

Differs from the official code:
    The port compares MLP outputs, sums squares over rows, tokens (padding too) and width with a factor of one half, and
    leaves out a layer whose term is 0.1 or more, so that whatever has moved far is free to move on. `legacy` does the
    same, per micro-batch; take lambda 0.0001 with it. Ours is a mean, does not feel padding, and has no gate. The
    port's reference pass keeps gradients; ours does not, which changes no number.

Cost:
    One forward and one backward pass per step, and one forward pass of the reference: the adapter switched off, or a
    copy of the model. Memory: the chosen layers' activations twice.

Limits:
    A brake on whatever changes the features of the user's rows; it knows nothing of harmful requests. In the lab
    (2 % bad rows, 75 steps at 1.5e-4, one seed) it hardly helps: harm .89 with lambda 1, .75 with 10, where plain
    tuning has .95. The port's sums brake much harder: with `legacy` and 0.0001 harm is .00, but the loss on the user's
    rows ends at .33 in place of .14. Which layers, and how strong, is ours: sweep `lambda_`. The reported loss holds
    the penalty.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.nn import Module

from keelwright.core.config import require_in_range
from keelwright.core.errors import ConfigError
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import RowSets
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage, settings_of
from keelwright.training.feeds import Feeds
from keelwright.training.losses import Forward
from keelwright.training.memory import Copies
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.rows import IGNORED, Batch
from keelwright.training.setup import Reference, Setup
from keelwright.training.terms import Objective, Term

GATE: Final = 0.1
"""Only under `legacy`: a layer whose term reaches this is left out. The port's value."""


@dataclass(frozen=True, slots=True)
class LdifsConfig:
    """Settings of LDIFS."""

    lambda_: float = 1.0
    """Weight of the squared feature distance, 0 or more; 0 is plain tuning. Ours; the port: 0.0001 of its sums."""
    every: int = 4
    """Blocks between the compared hidden states, at least 1; the last one is always compared. Ours: 4."""
    legacy: bool = False
    """Compare as the port does: MLP outputs, sums, and no layer that has moved far."""

    def __post_init__(self) -> None:
        require_in_range("lambda_", self.lambda_, low=0.0)
        require_in_range("every", self.every, low=1)


def chosen_layers(blocks: int, every: int) -> tuple[int, ...]:
    """Return after which blocks features are compared, counted from 1: every so many, and the last.

    >>> chosen_layers(10, 4)
    (4, 8, 10)
    """
    return tuple(sorted({*range(every, blocks + 1, every), blocks}))


def squared_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor], wanted: Tensor) -> Tensor:
    """Return the sum over layers and tokens of the squared distance, as a mean over the width.

    Args:
        ours: Features by layer. Shape `[batch, tokens, width]`.
        theirs: The reference's; no gradient flows into them.
        wanted: True where a token counts. Shape `[batch, tokens]`.

    Returns:
        Shape `[]`, float32.
    """
    parts = [
        (one[wanted].float() - two.detach()[wanted].float()).square().mean(-1).sum()
        for one, two in zip(ours, theirs, strict=True)
    ]
    return torch.stack(parts).sum()


def gated_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor], strength: float) -> Tensor:
    """Return the port's penalty: half the strength times squared distances, of the layers that are still near."""
    parts = torch.stack(
        [
            0.5 * strength * (one.float() - two.detach().float()).square().sum()
            for one, two in zip(ours, theirs, strict=True)
        ]
    )
    return parts[parts.detach() < GATE].sum()


@dataclass(frozen=True, slots=True)
class LdifsLoss:
    """Cross entropy and feature distance of the same rows, from one forward pass of each model."""

    config: LdifsConfig
    reference: Reference
    module: Module
    """What the trained model's hooks sit on."""
    layers: tuple[int, ...]
    scale: float = 1.0
    """What turns the penalty's own sum into one that is divided by answer tokens."""

    def __call__(self, model: Forward, batch: Batch) -> Tensor:
        """Return the sum over a micro-batch."""
        # The reference first: with an adapter it switches flags that the graph reads.
        theirs, _ = self._features(self.reference, self.reference.module, batch)
        ours, output = self._features(model, self.module, batch)
        targets = batch.labels[:, 1:]
        wanted = targets != IGNORED
        loss = torch.nn.functional.cross_entropy(
            output.logits[:, :-1][wanted].float(), targets[wanted], reduction="sum"
        )
        if self.config.legacy:
            return loss + self.scale * gated_distance(ours, theirs, self.config.lambda_)
        return loss + self.config.lambda_ * self.scale * squared_distance(ours, theirs, batch.attention_mask.bool())

    def _features(self, model: Forward, module: Module, batch: Batch) -> tuple[list[Tensor], Any]:
        asked = functools.partial(model, input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        if not self.config.legacy:
            output = asked(use_cache=False, output_hidden_states=True)
            return [output.hidden_states[layer] for layer in self.layers], output
        with _mlp_outputs(module) as found:
            output = asked(use_cache=False)
        return found, output


@contextmanager
def _mlp_outputs(module: Module) -> Iterator[list[Tensor]]:
    """Yield a list that is filled with every block's MLP output, in order, during a forward pass."""
    found: list[Tensor] = []
    mlps = [child for name, child in module.named_modules() if re.search(r"\.\d+\.mlp$", name)]
    if not mlps:
        raise ConfigError(
            "The model has no modules named 'mlp' in its blocks.",
            expected="blocks with an 'mlp', as in Llama or Qwen",
            found=type(module).__name__,
            fix="leave 'legacy' off: hidden states are compared in every architecture",
        )
    hooks = [mlp.register_forward_hook(lambda _, __, output: found.append(output)) for mlp in mlps]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class LdifsObjective(Objective):
    """The user's rows, and features that stay."""

    config: LdifsConfig = LdifsConfig()

    def begin(self, setup: Setup) -> None:
        """Keep the reference model."""
        self._feeds: Feeds = setup.feeds
        self._loss: LdifsLoss | None = None
        if self.config.lambda_:
            blocks = int(setup.module.config.get_text_config().num_hidden_layers)
            layers = chosen_layers(blocks, self.config.every)
            self._loss = LdifsLoss(self.config, setup.reference(), setup.module, layers)

    def terms(self, step: int) -> Sequence[Term]:
        """Return the loss with its penalty."""
        if self._loss is None:
            return super().terms(step)
        # The composer divides by the step's answer tokens; the distance is a mean over all tokens, or a plain sum.
        answers = self._feeds.count(self.feed, step, per="token")
        rows = self._feeds.feeds[self.feed].rows
        tokens = sum(len(rows[index].ids) for index in self._feeds.indices(self.feed, step))
        scale = answers / (1 if self.config.legacy else tokens)
        return (Term("loss", self.feed, loss=replace(self._loss, scale=scale)),)


@dataclass(frozen=True, slots=True)
class Ldifs:
    """LDIFS as a defence of the tuning stage."""

    config: LdifsConfig = LdifsConfig()

    config_class: ClassVar[type[LdifsConfig]] = LdifsConfig
    stage: ClassVar[Stage] = "tuning"
    roles: ClassVar[tuple[str, ...]] = ()
    copies: ClassVar[Copies] = Copies(models=1)

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the user's run."""
        feeds = {"user": Feed(rows.require("user", who="The defence 'ldifs'"))}
        return Recipe(feeds, train, LdifsObjective(config=self.config), settings_of("ldifs", self.config))

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN
