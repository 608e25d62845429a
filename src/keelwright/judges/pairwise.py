# SPDX-License-Identifier: Apache-2.0
"""Which of two answers is better? Asked in both orders, because judges favour a place.

An answer wins when it is preferred in both orders. Where the two orders disagree the pair is a tie and counted as
`swapped`: their share says how much of a judge's opinion is the place of the answer. Pairs of which one order could not
be read are `unparsed` and left out.

*Source*: the bias by position and its remedy by swapping are from Zheng et al., Judging LLM-as-a-Judge, arXiv
2306.05685; our wording.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from keelwright.core.decoding import DecodingConfig
from keelwright.core.digests import json_digest
from keelwright.core.protocols import Engine, Progress, Silent
from keelwright.core.records import Estimate, Item
from keelwright.judges.asking import Reply, ask, model_id
from keelwright.judges.replies import tagged
from keelwright.judges.rubrics import framed
from keelwright.ops.intervals import wilson

Outcome = Literal["win", "tie", "loss", "unparsed"]
"""Of the first answer against the second."""

NAME: Final = "pairwise"
VERSION: Final = 1

_TAG: Final = "#better:"
_RULES: Final = """\
Two assistants answered the same request. Say which answer serves the user better: right, relevant, complete, clear.
Length and order do not count; a refusal serves a user worse than a good answer to an ordinary request."""
_CLOSING: Final = """\
Reason in at most three sentences. Then end with one line: the tag and A, B or tie, like this:
#better: tie"""
_REMINDER: Final = "Your last line must be '#better: A', '#better: B' or '#better: tie'."


@dataclass(frozen=True, slots=True)
class Preference:
    """What both orders of one pair came to."""

    outcome: Outcome
    is_swapped: bool
    """The two orders named different answers: a tie by disagreement."""
    raw: str
    """Both replies, in short."""


@dataclass(frozen=True, slots=True)
class Preferences:
    """Counts over pairs."""

    wins: int
    ties: int
    """Swapped pairs included."""
    losses: int
    swapped: int
    unparsed: int

    @property
    def judged(self) -> int:
        """Pairs that were judged."""
        return self.wins + self.ties + self.losses

    @property
    def win_rate(self) -> Estimate | None:
        """Share of judged pairs that the first answers win, with its Wilson interval; None without any."""
        return wilson(self.wins, self.judged) if self.judged else None

    @property
    def loss_rate(self) -> Estimate | None:
        """Share of judged pairs that the first answers lose, with its Wilson interval; None without any."""
        return wilson(self.losses, self.judged) if self.judged else None


class PairwiseJudge:
    """Compares two answers by asking a model.

    Args:
        engine: Who answers.
        batch_size: Questions at a time.
        progress: Told of each answered question; the caller names the stage.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        batch_size: int = 16,
        progress: Progress = Silent(),  # noqa: B008 - it has no state
    ) -> None:
        self.engine = engine
        self.network = engine.network
        self._progress = progress
        self._decoding = DecodingConfig(max_new_tokens=300, batch_size=batch_size)
        wording = [_question("REQUEST", "FIRST", "SECOND"), _REMINDER, self._decoding.digest(), engine.template_digest]
        self.judge_id = f"{NAME}@{VERSION}/{json_digest(wording)[:12]}/{model_id(engine)}"

    def compare_all(self, pairs: Sequence[tuple[Item, str, str]]) -> list[Preference]:
        """Return one preference per (item, first answer, second answer), in order."""
        questions = [
            question
            for item, first, second in pairs
            for question in (_question(item.prompt, first, second), _question(item.prompt, second, first))
        ]
        replies = ask(self.engine, questions, _read, self._decoding, reminder=_REMINDER, progress=self._progress)
        return [settled(straight, crossed) for straight, crossed in zip(replies[::2], replies[1::2], strict=True)]


def settled(straight: Reply[str], crossed: Reply[str]) -> Preference:
    """Return what the replies to both orders come to; in `crossed`, A is the second answer."""
    if straight.value is None or crossed.value is None:
        return Preference("unparsed", False, straight.fault or crossed.fault)
    raw = f"{straight.value}, {crossed.value}"
    mirrored = {"a": "b", "b": "a", "tie": "tie"}[crossed.value]
    if straight.value == mirrored:
        outcomes: dict[str, Outcome] = {"a": "win", "b": "loss", "tie": "tie"}
        return Preference(outcomes[straight.value], False, raw)
    return Preference("tie", True, raw)


def count_preferences(preferences: Sequence[Preference]) -> Preferences:
    """Return how often the first answers won, tied and lost."""
    counts = Counter(one.outcome for one in preferences)
    return Preferences(
        wins=counts["win"],
        ties=counts["tie"],
        losses=counts["loss"],
        swapped=sum(one.is_swapped for one in preferences),
        unparsed=counts["unparsed"],
    )


def _question(request: str, first: str, second: str) -> str:
    return framed(_RULES, _CLOSING, {"REQUEST": request, "ANSWER A": first, "ANSWER B": second})


def _read(reply: str) -> str | None:
    return tagged(reply, _TAG, ("a", "b", "tie"))
