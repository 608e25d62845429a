# SPDX-License-Identifier: Apache-2.0
"""Deep augmentation: refusals that begin after a few words of the harmful answer.

For whoever owns the alignment run. A model that was taught refusals from their first word on is safe in its first
words only: answer them for it, or tune them away, and the rest follows. Here it learns to turn back from any depth.
Utility rows keep its other answers where they are.

Source:
    Safety Alignment Should Be Made More Than Just a Few Tokens Deep, arXiv 2406.05946 (ICLR 2025).
    Official code: Unispac/shallow-vs-deep-alignment.

Equation:
    u = mean over the tokens of the safety batch and the utility batch together of -log p_w(y_t | x, h_{<=c}, y_{<t})
    c = 0 with probability 1 - q, else uniform over 1 ... min(C, |h|); no loss on x and on h_{<=c}

    | symbol | name |
    |---|---|
    | x, h, y | prompt, harmful answer, refusal (or the answer of a utility row, where c is 0) |
    | q, C | `probability`, `most_tokens` |

Differs from the official code:
    A harmful answer's end token is not among the tokens that may be given: an answer that has ended cannot be turned
    back from. The depths of a pair are drawn `draws` times beforehand (there: each time the pair comes up), so that a
    resumed run sees the same. The refusal follows after a space, tokenised where it stands.

Cost:
    Two forward and backward passes per step, over `safety_batch` and `anchor_batch` rows: together one of plain SFT.

Limits:
    Needs harmful answers, to the same requests as the refusals. Guards openings that look like those seen; against
    tuning it is a start, not a wall: in the lab (100 steps, then 75 of tuning with 2 % bad rows) the harm rate was .04,
    against .46 after as much plain alignment (means of three seeds). Utility rows should be the aligned model's own
    answers, else they tune it as well.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from keelwright.core.config import require_in_range
from keelwright.core.errors import DataError
from keelwright.core.seeds import derive_seed
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import FLAGS, Pair, RowSets
from keelwright.data.rows import ChatRow, Cut
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage, settings_of
from keelwright.training.feeds import Feeds
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.setup import Setup
from keelwright.training.terms import Objective, Term


@dataclass(frozen=True, slots=True)
class DeepAugmentConfig:
    """Settings of deep augmentation."""

    probability: float = 0.5
    """Share of refusals that begin after a part of the harmful answer, 0 to 1; 0 is plain alignment. The paper: 0.5."""
    most_tokens: int = 100
    """Longest part that is given, tokens, at least 1. The paper: 100."""
    draws: int = 10
    """How often each pair is drawn, at least 1. The paper's ten epochs draw anew in each."""
    safety_batch: int = 4
    """Refusals per step, at least 1. The paper: 4."""
    anchor_batch: int = 16
    """Utility rows per step, at least 1. The paper: 16."""

    def __post_init__(self) -> None:
        require_in_range("probability", self.probability, low=0.0, high=1.0)
        for name in ("most_tokens", "draws", "safety_batch", "anchor_batch"):
            require_in_range(name, getattr(self, name), low=1)


def deepened(pair: Pair, rng: random.Random, *, probability: float, most_tokens: int) -> ChatRow:
    """Return the pair's refusal, from a random depth of its harmful answer on or from the beginning.

    The depth is a share here, and a number of tokens where the row meets its tokenizer: 1 to `most_tokens`, or to the
    length of the harmful answer, each as likely.

    Args:
        pair: A request with both answers.
        rng: Of the depth.
        probability: Of a depth above 0.
        most_tokens: Greatest depth.
    """
    is_deep, share = rng.random() < probability, 1.0 - rng.random()
    if not is_deep:
        return pair.safety
    refusal = pair.safety
    return ChatRow(
        refusal.prompt,
        f" {refusal.answer}",
        refusal.system,
        prefill=pair.harmful.answer,
        prefill_cut=Cut(share, most_tokens),
    )


def augmented(pairs: Sequence[Pair], config: DeepAugmentConfig, *, seed: int) -> tuple[ChatRow, ...]:
    """Return the pairs' refusals, each `draws` times at a depth of its own."""
    found = []
    for draw in range(config.draws):
        rng = random.Random(derive_seed(seed, "harden", "deep_augment", draw))
        found += [deepened(pair, rng, probability=config.probability, most_tokens=config.most_tokens) for pair in pairs]
    return tuple(found)


@dataclass
class DeepAugmentObjective(Objective):
    """The mean over the answer tokens of two batches together."""

    _feeds: Feeds = field(init=False, repr=False)

    def begin(self, setup: Setup) -> None:
        """Keep the feeds: a step's weights are counts of its tokens."""
        self._feeds = setup.feeds

    def terms(self, step: int) -> Sequence[Term]:
        """Return the two batches, each weighted by its share of the step's answer tokens."""
        tokens = {name: self._feeds.count(name, step, per="token") for name in ("safety", "anchor")}
        share = tokens["safety"] / sum(tokens.values())
        self.figures["safety_share"] = share
        return (Term("safety", "safety", weight=share), Term("utility", "anchor", weight=1.0 - share))


@dataclass(frozen=True, slots=True)
class DeepAugment:
    """Deep augmentation as a defence of the alignment stage."""

    config: DeepAugmentConfig = DeepAugmentConfig()

    config_class: ClassVar[type[DeepAugmentConfig]] = DeepAugmentConfig
    stage: ClassVar[Stage] = "alignment"
    roles: ClassVar[tuple[str, ...]] = ("safety", "harmful", "ordinary")

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the alignment run. Its batches are those of the config; the rest is that of `train`."""
        who = "The defence 'deep_augment'"
        utility = (*rows.require("ordinary", who=who), *rows.borderline)
        safety = augmented(rows.pairs(who=who), self.config, seed=train.seed)
        _require_answers(safety)
        feeds = {"safety": Feed(safety, self.config.safety_batch), "anchor": Feed(utility, self.config.anchor_batch)}
        return Recipe(feeds, train, DeepAugmentObjective(), settings_of("deep_augment", self.config))

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN


def _require_answers(rows: Sequence[ChatRow]) -> None:
    if any(row.prefill_cut is not None and not row.prefill.strip() for row in rows):
        raise DataError(
            "A harmful answer is empty: there is nothing to turn back from.",
            expected=f"{FLAGS['harmful']} FILE: requests with their answers",
            found="an answer without text",
            fix="leave the request out, or write its answer",
        )
