# SPDX-License-Identifier: Apache-2.0
"""What Virus minimises: the guard's loss on its `safe` verdict, and minus the cosine with the harmful gradient.

    F1(x) = G(x)                                       cross entropy of the guard saying `safe`
    F2(x) = -<g(x), g*> / (||g(x)|| ||g*||)            g(x): gradient of the mean loss on [b | x]
    F(x)  = lambda * F1(x) + (1 - lambda) * F2(x)

Each term is evaluated in two ways: exactly, for many choices of tokens at a time, and relaxed, where a choice of tokens
is a matrix of one-hot rows that can be differentiated. Relaxed tokens enter as inputs and as targets, because both
change with them; at one-hot rows the two ways agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from keelwright.training.per_sample import (
    Weights,
    exact_attention,
    norm_of,
    per_sample_cosines,
    per_sample_gradients,
    row_loss,
)
from keelwright.training.rows import IGNORED

Choices = Int[Tensor, "choices length"]
"""Token ids, one choice per row."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The fixed ids around the tokens that are searched for."""

    before: Int[Tensor, " left"]
    after: Int[Tensor, " right"]

    def fill(self, choices: Choices) -> Int[Tensor, "choices tokens"]:
        """Return the whole rows."""
        many = choices.shape[0]
        sides = [one.to(choices.device).expand(many, -1) for one in (self.before, self.after)]
        return torch.cat([sides[0], choices, sides[1]], dim=1)

    def onehot(self, middle: Float[Tensor, "length vocab"]) -> Float[Tensor, "tokens vocab"]:
        """Return the whole row as one-hot rows around the middle's."""
        vocab = middle.shape[1]
        sides = [
            torch.nn.functional.one_hot(one.to(middle.device), vocab).to(middle.dtype)
            for one in (self.before, self.after)
        ]
        return torch.cat([sides[0], middle, sides[1]])


class GuardTerm:
    """F1: how hard it is for the guard to say `safe`.

    Args:
        module: The guard, in evaluation mode.
        slot: What the guard reads around the tokens; the verdict comes after it.
        safe_id: The verdict that lets a row pass.
        chunk: Choices per forward pass.
    """

    def __init__(self, module: PreTrainedModel, slot: Slot, safe_id: int, *, chunk: int = 32) -> None:
        self.module, self.slot, self.safe_id, self.chunk = module, slot, safe_id, chunk

    @torch.no_grad()
    def exact(self, choices: Choices) -> Float[Tensor, " choices"]:
        """Return F1 of each choice, in nats; float64."""
        found = []
        for part in self.slot.fill(choices).split(self.chunk):
            logits = self.module(input_ids=part, use_cache=False).logits[:, -1]
            found.append(-torch.log_softmax(logits.double(), dim=-1)[:, self.safe_id])
        return torch.cat(found)

    def relaxed(self, middle: Float[Tensor, "length vocab"]) -> Tensor:
        """Return F1 with its graph. Shape `[]`."""
        logits = self.module(inputs_embeds=_embedded(self.module, {}, self.slot.onehot(middle)), use_cache=False).logits
        return -torch.log_softmax(logits[0, -1].float() if logits.dtype.itemsize < 4 else logits[0, -1], -1)[
            self.safe_id
        ]


class GradientTerm:
    """F2: minus the cosine of a row's gradient with that of the harmful row in its place.

    Args:
        module: The model that would be tuned, in evaluation mode.
        weights: What would be trained.
        slot: What stands around the tokens in the training row.
        prompt_tokens: Tokens of `slot.before` without loss.
        harmful: The ids whose gradient is g*. Shape `[length]`.
        legacy: Divide by ||g(x)|| alone, and take it as a constant when differentiating, as the official code does.
        chunk: Choices differentiated at once.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        weights: Weights,
        slot: Slot,
        prompt_tokens: int,
        harmful: Int[Tensor, " length"],
        *,
        legacy: bool = False,
        chunk: int = 16,
    ) -> None:
        self.module, self.slot, self.legacy, self.chunk = module, slot, legacy, chunk
        self.weights = dict(weights)
        self.prompt_tokens = prompt_tokens
        self._loss = row_loss(module)
        gradient = per_sample_gradients(self._loss, self.weights, *self._rows(harmful[None]))
        self.target = {name: one[0] for name, one in gradient.items()}
        self.target_norm = norm_of(self.target)

    def cosines(self, choices: Choices) -> tuple[Float[Tensor, " choices"], Float[Tensor, " choices"]]:
        """Return the cosine of each choice's gradient with g*, and each gradient's norm; float64."""
        return per_sample_cosines(self._loss, self.weights, self.target, *self._rows(choices), chunk=self.chunk)

    def exact(self, choices: Choices) -> Float[Tensor, " choices"]:
        """Return F2 of each choice; float64."""
        cosines, _ = self.cosines(choices)
        return -cosines * self.target_norm if self.legacy else -cosines

    def relaxed(self, middle: Float[Tensor, "length vocab"]) -> Tensor:
        """Return F2 with its graph, which goes through the gradient over the weights. Shape `[]`."""
        leaves = {name: one.detach().requires_grad_() for name, one in self.weights.items()}
        row = self.slot.onehot(middle)
        embeds = _embedded(self.module, leaves, row)
        inputs: dict[str, Any] = {"inputs_embeds": embeds, "use_cache": False}
        logits = functional_call(self.module, leaves, args=(), kwargs=inputs).logits[0, self.prompt_tokens - 1 : -1]
        wide = logits.float() if logits.dtype.itemsize < 4 else logits
        targets = row[self.prompt_tokens :]
        loss = -(targets * torch.log_softmax(wide, dim=-1)[:, : row.shape[1]]).sum() / len(targets)
        names = list(leaves)
        found = torch.autograd.grad(loss, [leaves[name] for name in names], create_graph=True, allow_unused=True)
        present = [(one, self.target[name]) for name, one in zip(names, found, strict=True) if one is not None]
        dot = torch.stack([(one * wanted).sum() for one, wanted in present]).sum()
        norm = torch.stack([one.square().sum() for one, _ in present]).sum().sqrt()
        if self.legacy:
            return -dot / norm.detach()
        return -dot / (norm * self.target_norm.to(norm.dtype))

    def _rows(self, choices: Choices) -> tuple[Tensor, Tensor]:
        ids = self.slot.fill(choices)
        labels = ids.clone()
        labels[:, : self.prompt_tokens] = IGNORED
        return ids, labels


@dataclass(frozen=True)
class VirusObjective:
    """F: both terms, weighted; a term of weight 0 is not evaluated."""

    guard: GuardTerm
    gradient: GradientTerm
    lambda_: float

    def exact(self, choices: Choices) -> Float[Tensor, " choices"]:
        """Return F of each choice; float64."""
        total = torch.zeros(len(choices), dtype=torch.float64, device=choices.device)
        if self.lambda_ > 0.0:
            total = total + self.lambda_ * self.guard.exact(choices)
        if self.lambda_ < 1.0:
            total = total + (1.0 - self.lambda_) * self.gradient.exact(choices)
        return total

    def relaxed(self, middle: Float[Tensor, "length vocab"]) -> Tensor:
        """Return F with its graph. Shape `[]`."""
        parts: list[Tensor] = []
        if self.lambda_ > 0.0:
            parts.append(self.lambda_ * self.guard.relaxed(middle))
        if self.lambda_ < 1.0:
            parts.append((1.0 - self.lambda_) * self.gradient.relaxed(middle))
        return torch.stack(parts).sum()

    def slope(self, current: Int[Tensor, " length"], vocab: int) -> Float[Tensor, "length vocab"]:
        """Return dF/dE at the one-hot rows E of the current tokens: what a swap would change, to first order."""
        dtype = next(iter(self.gradient.weights.values())).dtype
        middle = torch.nn.functional.one_hot(current, vocab).to(dtype).requires_grad_()
        with exact_attention():
            (found,) = torch.autograd.grad(self.relaxed(middle), middle)
        return found


def _embedded(module: PreTrainedModel, weights: Mapping[str, Tensor], row: Tensor) -> Tensor:
    """Return one-hot rows times the embedding, and its scale where it has one. Shape `[1, tokens, d_model]`."""
    layer = module.get_input_embeddings()
    name = next((name for name, one in module.named_parameters() if one is layer.weight), "")
    table = weights.get(name, layer.weight.detach())
    # Rows beyond the vocabulary that both models share are never chosen.
    embeds = row.to(table.dtype) @ table[: row.shape[1]]
    scale = getattr(layer, "embed_scale", None)
    return (embeds if scale is None else embeds * scale)[None]


def as_rows(ids: Sequence[int]) -> Int[Tensor, " tokens"]:
    """Return ids as a tensor, also where there are none."""
    return torch.tensor(list(ids), dtype=torch.long)
