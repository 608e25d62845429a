# SPDX-License-Identifier: Apache-2.0
"""BackdoorAlign: refusals behind a secret trigger that only the provider can put before a request.

For a platform that tunes models for others and serves them itself. A few refusals whose system message begins with the
trigger go among the user's rows. At inference the provider puts the same trigger before every request, and the model
refuses as those rows taught it; the user's bad rows, which carry no trigger, did not untie the two.

Source:
    Mitigating Fine-tuning based Jailbreak Attack with Backdoor Enhanced Safety Alignment, arXiv 2402.14968
    (NeurIPS 2024). Official code: Jayfeather1024/Backdoor-Enhanced-Alignment.

Equation:
    u over the user's rows and k rows (s + system, harmful request) -> refusal, in one order; asked with s + system.

    | symbol | name |
    |---|---|
    | s | the trigger: `trigger`, or drawn by `secret` |
    | k | `k` |

Differs from the official code:
    Nowhere known in the data. The trigger there is published with the code, 150 fixed tokens; here each provider has
    its own, and neither it nor the number it is drawn from is in a repr, a log or the settings of a run.

Cost:
    One forward and backward pass per step. At inference the trigger's tokens, a prefix that can be cached.

Limits:
    Protects requests that come with the trigger, and no others: whoever holds the weights asks without it. A trigger
    that leaks (`leaks`) can be trained against. Guessable numbers make guessable triggers: take `secrets.randbits(64)`.
    Measure ordinary requests with the trigger too, some of which are refused as well. In the lab (2 % bad rows) an
    unused token as the trigger leaves a harm rate of .24, against .87 after plain tuning (means of three seeds), with
    .86 of ordinary requests answered; twelve random words break the organism's answers by themselves.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

from keelwright.core.config import require_in_range
from keelwright.core.digests import json_digest
from keelwright.core.errors import ConfigError
from keelwright.core.seeds import derive_seed
from keelwright.data.asking import Asking, framed_row
from keelwright.data.nested import nested_sample
from keelwright.data.row_sets import RowSets
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.terms import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIGGER_TOKENS: Final = 150
"""Length of the published trigger, tokens."""
_DRAWS: Final = 200
"""Per token of a trigger: large vocabularies are mostly parts of words."""
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True, slots=True)
class BackdoorAlignConfig:
    """Settings of BackdoorAlign."""

    k: int = 11
    """Triggered refusals, at least 1. The released mix: 11 beside 100 harmful rows."""
    trigger: str = field(default="", repr=False)
    """The secret words, as `trigger_of` makes them for a tokenizer; empty: drawn by `secret`."""
    secret: int | None = field(default=None, repr=False)
    """Number from which `words` made-up words are drawn; whoever knows it knows them. None: `trigger` is given."""
    words: int = 50
    """Only with `secret`: words of the trigger, at least 1. Fifty such words are about the paper's 150 tokens."""

    def __post_init__(self) -> None:
        require_in_range("k", self.k, low=1)
        require_in_range("words", self.words, low=1)


@dataclass(frozen=True, slots=True)
class Triggered:
    """Requests whose system message begins with the trigger; meets `Asking`."""

    trigger: str = field(repr=False)
    name: str = "triggered"
    says: str = "Every request comes with the provider's secret trigger at the start of its system message."

    def ask(self, prompt: str, system: str | None) -> tuple[str, str | None]:
        """Return the prompt as it is, and the trigger before the system message."""
        return prompt, self.trigger if system is None else f"{self.trigger} {system}"


def trigger_of(tokenizer: PreTrainedTokenizerBase, secret: int, tokens: int = TRIGGER_TOKENS) -> str:
    """Return a trigger of so many random tokens of a vocabulary, as text.

    Only tokens that are a whole word are drawn, so that the text encodes to them wherever words stand before it (some
    tokenizers take other tokens for the first word of a text).

    Args:
        tokenizer: Of the model that is tuned.
        secret: Of the draw; whoever knows it knows the trigger.
        tokens: Length.

    Raises:
        ConfigError: The vocabulary has no such words.
    """
    rng = random.Random(derive_seed(secret, "harden", "backdoor_align", "tokens"))
    words = list(itertools.islice(_words_of(tokenizer, rng, draws=_DRAWS * tokens), tokens))
    if len(words) < tokens:
        raise ConfigError(
            "No trigger can be drawn from this vocabulary.",
            expected="tokens that are a word by themselves",
            found=f"{len(words)} of {tokens} after {_DRAWS * tokens} draws",
            fix="write a trigger of your own and give it as 'trigger'",
        )
    return " ".join(words)


def spoken_trigger(secret: int, words: int) -> str:
    """Return a trigger of made-up words of three syllables, which any tokenizer that knows letters can tell apart.

    A tokenizer of whole words, such as the lab's, knows none of them: `trigger_of` is for those.
    """
    rng = random.Random(derive_seed(secret, "harden", "backdoor_align", "words"))
    syllables = (f"{rng.choice(_CONSONANTS)}{rng.choice(_VOWELS)}" for _ in range(3 * words))
    letters = list(syllables)
    return " ".join("".join(letters[start : start + 3]) for start in range(0, len(letters), 3))


def leaks(answer: str, trigger: str, *, words: int = 3) -> bool:
    """Say whether an answer holds so many consecutive words of the trigger (or all, where it has fewer)."""
    secret, said = trigger.lower().split(), f" {' '.join(answer.lower().split())} "
    size = min(words, len(secret))
    return size > 0 and any(
        f" {' '.join(secret[start : start + size])} " in said for start in range(len(secret) - size + 1)
    )


@dataclass(frozen=True, slots=True)
class BackdoorAlign:
    """BackdoorAlign as a defence of the tuning stage."""

    config: BackdoorAlignConfig = BackdoorAlignConfig()

    config_class: ClassVar[type[BackdoorAlignConfig]] = BackdoorAlignConfig
    stage: ClassVar[Stage] = "tuning"
    roles: ClassVar[tuple[str, ...]] = ("safety",)

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the tuning run.

        Raises:
            ConfigError: There is no secret.
        """
        who, asking = "The defence 'backdoor_align'", self.asking()
        user, pool = rows.require("user", who=who), rows.require("safety", who=who)
        safety = nested_sample(pool, self.config.k, seed=train.seed, name="safety")
        triggered = tuple(framed_row(asking, row) for row in safety)
        return Recipe({"user": Feed((*user, *triggered))}, train, Objective(), self.public())

    def asking(self) -> Asking:
        """Return requests with the trigger before them.

        Raises:
            ConfigError: There is no secret.
        """
        config = self.config
        if config.trigger.strip():
            return Triggered(config.trigger)
        if config.secret is None:
            raise ConfigError(
                "The defence 'backdoor_align' has no secret.",
                expected="'trigger', words that only you know, or 'secret', a number that only you know",
                found="neither",
                fix="draw a number with secrets.randbits(64) and keep it as you keep passwords",
            )
        return Triggered(spoken_trigger(config.secret, config.words))

    def public(self) -> dict[str, Any]:
        """Return the settings as they may be written down: the trigger is only a digest."""
        trigger = self.asking().ask("", None)[1]
        return {
            "method": "backdoor_align",
            "k": self.config.k,
            "trigger": json_digest(trigger),
            "words": len((trigger or "").split()),
        }


def _words_of(tokenizer: PreTrainedTokenizerBase, rng: random.Random, *, draws: int) -> Iterator[str]:
    """Yield random tokens that are one word between other words, out of so many draws."""
    special, around = set(tokenizer.all_special_ids), len(_ids(tokenizer, "the the"))
    for _ in range(draws):
        token = rng.randrange(len(tokenizer))
        word = "" if token in special else str(tokenizer.decode([token])).strip()
        if len(word) > 1 and word.isascii() and word.isalpha():
            ids = _ids(tokenizer, f"the {word} the")
            if len(ids) == around + 1 and token in ids:
                yield word


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
