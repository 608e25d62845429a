# SPDX-License-Identifier: Apache-2.0
"""TAR: train the model so that it still refuses after somebody has tuned it on harmful answers.

For whoever releases a model and can pay for it. At every step an adversary's tuning is carried out on a copy of the
weights; on the way the loss of what should still hold is taken, and its gradient is applied where the copy set out.

Source:
    Tamper-Resistant Safeguards for Open-Weight LLMs, arXiv 2408.00761 (ICLR 2025), Algorithm 1. Official code:
    rishub-tamirisa/tamper-resistance, `modules/training.py` (commit 19de233).

Equation:
    g = r * grad L_retain(w) + scale/n * sum over adversaries, sum over k of exp(lambda_s (k-(K-1))) grad L_TR(w_k)
    L_retain = CE + mean over states and tokens of ||H(w) - H(w_0)||_2
    w_k: after k + 1 AdamW steps on the adversary's rows; k + 1 runs over the multiples of s up to K

    | symbol | name |
    |---|---|
    | r, scale | `retain_scale`, `tamper_scale` |
    | n, K, s, lambda_s | `adversaries`, `inner_steps`, `every`, `schedule_lambda` |
    | L_TR on held-out requests | `loss`: `refusal` cross entropy of the refusal; `dpo` refusal over harmful answer; |
    | | `entropy` minus the entropy of the next token along the harmful answer |
    | CE, H | on alignment rows; hidden states of every layer, and those of the frozen starting model |

    The derivative of w_k by w is taken as the identity. A share of the adversaries trains on ordinary rows first and
    switches after K * Beta(6, 3) steps.

Differs from the official code:
    Losses are means over answer tokens, `H` over tokens without padding (there: over padding too, and the entropy over
    the prompt). Requests of held-out rows are never the adversary's. The copy back is exact. No lower bound switches
    the term off (there: only without the flag that the paper's scripts set).

Cost:
    n (K + K/s) + 1 forward and backward passes per step, and a forward pass of the reference. Memory: a copy of the
    weights, one more gradient, AdamW's two moments once more, and the reference unless an adapter is trained.

Limits:
    It defends against the adversaries that it trained with: rates, optimiser and rows matter, and those of the lab's
    test were close to the attack's. With `entropy` the lab's answers became incoherent. First order. Another project's
    TAR baseline (T-Vaccine's trainer) writes the gradient to an attribute that no optimiser reads, and is plain tuning:
    do not compare with figures from there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import DataError
from keelwright.core.seeds import generator
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import Pair, RowSets
from keelwright.ops.dpo import answer_logprobs, dpo_loss
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage, settings_of
from keelwright.training.inner import InnerTraining
from keelwright.training.losses import Forward, Loss, answer_loss
from keelwright.training.memory import Copies
from keelwright.training.paired_rows import partners
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.reference import kept_logprobs
from keelwright.training.rows import IGNORED, Batch
from keelwright.training.setup import Setup
from keelwright.training.terms import Objective, Term

TamperLoss = Literal["dpo", "refusal", "entropy"]


@dataclass(frozen=True, slots=True)
class TarConfig:
    """Settings of TAR."""

    loss: TamperLoss = "dpo"
    """What should hold after tampering. The paper: `dpo` for refusals, `entropy` for hazardous knowledge."""
    inner_steps: int = 64
    """K, steps of the adversary, at least 1. The paper's script: 64."""
    every: int = 4
    """s: the loss is taken after every s-th of them, 1 to K. The script: 4."""
    tamper_scale: float = 4.0
    """Factor of the tamper-resistance gradient, 0 or more; 0 is plain alignment with `L_retain`. The script: 4."""
    schedule_lambda: float = 0.0625
    """How much less early places count, 0 or more; 0 counts all alike. The script: 0.0625."""
    inner_lrs: tuple[float, ...] = (2e-6, 2e-5, 4e-5)
    """Learning rates, above 0, of which each adversary draws one. The script's."""
    inner_batch: int = 4
    """Rows per step of the adversary, at least 1. The script: 4."""
    adversaries: int = 1
    """Adversaries per step, at least 1. The script: 1."""
    switch_share: float = 0.33
    """Share of the adversaries that train on ordinary rows first, 0 to 1; needs `ordinary` rows. The script: 0.33."""
    held_out_share: float = 0.5
    """Share of the harmful requests on which resistance is asked and no adversary trains, above 0, below 1. Ours."""
    held_out_batch: int = 8
    """Held-out rows per adversary, at least 1. The script: 8."""
    dpo_beta: float = 0.1
    """Only for `dpo`: strength of the pull to the starting model, above 0. The code: 0.1."""
    retain_scale: float = 1.0
    """Factor of `L_retain`, above 0. The script: 1."""
    representations: float = 1.0
    """Factor of the distance of hidden states within `L_retain`, 0 or more. The script: 1."""

    def __post_init__(self) -> None:
        for name in ("inner_steps", "every", "inner_batch", "adversaries", "held_out_batch"):
            require_in_range(name, getattr(self, name), low=1)
        require_in_range("every", self.every, high=self.inner_steps)
        for name in ("tamper_scale", "schedule_lambda", "representations"):
            require_in_range(name, getattr(self, name), low=0.0)
        for name in ("retain_scale", "dpo_beta"):
            require_in_range(name, getattr(self, name), low=0.0, low_open=True)
        require_in_range("switch_share", self.switch_share, low=0.0, high=1.0)
        require_in_range("held_out_share", self.held_out_share, low=0.0, high=1.0, low_open=True, high_open=True)
        require_in_range("inner_lrs", len(self.inner_lrs), low=1)
        for rate in self.inner_lrs:
            require_in_range("inner_lrs", rate, low=0.0, low_open=True)
        require_choice("loss", self.loss, get_args(TamperLoss))


def state_distance(
    states: Float[Tensor, "batch tokens d_model"],
    reference: Float[Tensor, "batch tokens d_model"],
    mask: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """Return the L2 distances of hidden states, summed over the tokens of the mask; evaluated in float32."""
    return _lengths(states[mask].float() - reference[mask].float()).sum()


def negative_entropy(logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, ""]:
    """Return minus the entropy of each distribution, in nats, summed over tokens; evaluated in float32."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    return (logprobs.exp() * logprobs).sum()


def entropy_loss(model: Forward, batch: Batch) -> Tensor:
    """Return minus the entropy of the next token along the answers, summed over their tokens (nats)."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return negative_entropy(output.logits[:, :-1][batch.labels[:, 1:] != IGNORED])


@dataclass(frozen=True, slots=True, eq=False)
class RetainLoss:
    """Cross entropy of the answers, and how far hidden states are from the reference's."""

    reference: Forward
    weight: float
    """Of the distance."""
    tokens_ratio: float
    """Answer tokens over all tokens of the step: the sum over answer tokens is divided by the first."""

    def __call__(self, model: Forward, batch: Batch) -> Tensor:
        """Return the sum over a micro-batch, for a mean over answer tokens."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        before = self.reference(**inputs, output_hidden_states=True).hidden_states
        output = model(**inputs, output_hidden_states=True)
        wanted = batch.labels[:, 1:] != IGNORED
        targets = batch.labels[:, 1:][wanted]
        loss = torch.nn.functional.cross_entropy(output.logits[:, :-1][wanted].float(), targets, reduction="sum")
        mask = batch.attention_mask.bool()
        distances = [state_distance(now, then, mask) for now, then in zip(output.hidden_states, before, strict=True)]
        return loss + self.weight * self.tokens_ratio * torch.stack(distances).mean()


@dataclass(frozen=True, slots=True, eq=False)
class PreferenceLoss:
    """DPO on held-out requests: the refusal over the harmful answer, against the starting model."""

    setup: Setup
    partner: Sequence[int]
    """By refusal: place of the harmful answer in its feed."""
    chosen: Sequence[Tensor]
    rejected: Sequence[Tensor]
    """Log-probability of every answer under the starting model, by place in the feed (nats)."""
    beta: float

    def __call__(self, model: Forward, batch: Batch) -> Tensor:
        """Return the sum over the pairs of a micro-batch."""
        rows = batch.rows.tolist()
        others = [self.partner[row] for row in rows]
        harmful = self.setup.feeds.batch("held out answers", others)
        ours, theirs = (
            answer_logprobs(
                model(input_ids=one.input_ids, attention_mask=one.attention_mask, use_cache=False).logits, one.labels
            )[0]
            for one in (batch, harmful)
        )
        before = torch.stack([self.chosen[row] for row in rows]).to(ours.device)
        before_theirs = torch.stack([self.rejected[row] for row in others]).to(ours.device)
        return dpo_loss(ours, theirs, before, before_theirs, beta=self.beta).sum()


@dataclass
class TarObjective(Objective):
    """Alignment rows at the weights, resistance at those that adversaries reach from there."""

    config: TarConfig = TarConfig()
    seed: int = 0
    """Of the adversaries' rates and switches."""
    switches: bool = False
    """Whether there are ordinary rows to train on first."""
    _loss: Loss = field(default_factory=lambda: answer_loss, init=False)
    _setup: Setup | None = field(default=None, init=False)
    _reference: Forward | None = field(default=None, init=False)

    def begin(self, setup: Setup) -> None:
        """Keep the starting model, and what it says of held-out pairs."""
        config, self._setup = self.config, setup
        if config.representations:
            self._reference = setup.reference()
        if config.loss == "entropy":
            self._loss = entropy_loss
        if config.loss == "dpo" and config.tamper_scale:
            feeds = ("held out", "held out answers")
            chosen, rejected = ([row.sum() for row in kept_logprobs(setup, feed).rows] for feed in feeds)
            self._loss = PreferenceLoss(setup, partners(setup.feeds, *feeds), chosen, rejected, config.dpo_beta)

    def terms(self, step: int) -> Sequence[Term]:
        """Return L_retain, and L_TR along the adversaries' tuning."""
        config = self.config
        per: Literal["row", "token"] = "row" if config.loss == "dpo" else "token"
        along = InnerTraining(
            "adversary",
            steps=config.inner_steps,
            every=config.every,
            lrs=config.inner_lrs,
            decay=config.schedule_lambda,
            runs=config.adversaries,
            before="ordinary" if self.switches else None,
            before_share=config.switch_share,
            seed=self.seed,
            figures=self.figures,
        )
        return (
            Term("retain", "alignment", weight=config.retain_scale, loss=self._retain(step)),
            Term("tamper resistance", "held out", weight=config.tamper_scale, loss=self._loss, at=along, per=per),
        )

    def _retain(self, step: int) -> Loss:
        if self._reference is None or self._setup is None:
            return answer_loss
        feeds = self._setup.feeds
        rows = feeds.feeds["alignment"].rows
        tokens = sum(len(rows[index].ids) for index in feeds.indices("alignment", step))
        ratio = feeds.count("alignment", step, per="token") / tokens
        return RetainLoss(self._reference, self.config.representations, ratio)


@dataclass(frozen=True, slots=True)
class Tar:
    """TAR as a defence of the alignment stage."""

    config: TarConfig = TarConfig()

    config_class: ClassVar[type[TarConfig]] = TarConfig
    stage: ClassVar[Stage] = "alignment"
    roles: ClassVar[tuple[str, ...]] = ("safety", "harmful")
    copies: ClassVar[Copies] = Copies(gradients=1, weights=3, models=1)

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the alignment run.

        Raises:
            DataError: Fewer than two harmful requests have both an answer and a refusal.
        """
        who, config = "The defence 'tar'", self.config
        adversary, held_out = split_requests(rows.pairs(who=who), config.held_out_share, train.seed)
        refusals, answers = [one.safety for one in held_out], [one.harmful for one in held_out]
        feeds = {
            "alignment": Feed(rows.alignment(who=who)),
            "adversary": Feed([one.harmful for one in adversary], config.inner_batch),
            "held out": Feed(answers if config.loss == "entropy" else refusals, config.held_out_batch),
        }
        if config.loss == "dpo":
            feeds["held out answers"] = Feed(answers, config.held_out_batch)
        switches = config.switch_share > 0.0 and bool(rows.ordinary)
        if switches:
            feeds["ordinary"] = Feed(rows.ordinary, config.inner_batch)
        objective = TarObjective(config=config, seed=train.seed, switches=switches)
        return Recipe(feeds, train, objective, settings_of("tar", config))

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN


def split_requests(pairs: Sequence[Pair], held_out_share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return the adversary's pairs and the held-out ones; no request is in both.

    Args:
        pairs: Harmful requests with both answers.
        held_out_share: Share of the requests that is held out, rounded, at least one; one is left too.
        seed: Of the choice.

    Raises:
        DataError: There are fewer than two requests.
    """
    requests = list(dict.fromkeys((one.harmful.prompt, one.harmful.system) for one in pairs))
    if len(requests) < 2:
        raise DataError(
            "The defence 'tar' needs harmful requests to train its adversary on, and others to test it on.",
            expected="at least two requests that are both answered and refused",
            found=str(len(requests)),
            fix="give more pairs with --harmful and --safety",
        )
    cut = min(max(1, math.floor(held_out_share * len(requests) + 0.5)), len(requests) - 1)
    order = torch.randperm(len(requests), generator=generator(seed, "tar", "held out")).tolist()
    kept = {requests[index] for index in order[:cut]}
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for one in pairs:
        sides[(one.harmful.prompt, one.harmful.system) in kept].append(one)
    return sides


def _lengths(vectors: Tensor) -> Tensor:
    """Return L2 norms along the last axis; where a vector is 0 the gradient is 0, not undefined."""
    squared = vectors.square().sum(dim=-1)
    apart = squared > 0
    return torch.where(apart, squared, 1.0).sqrt() * apart
