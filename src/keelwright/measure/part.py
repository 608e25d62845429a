# SPDX-License-Identifier: Apache-2.0
"""The parts of a suite: items that are asked in one way, judged by one panel and summed up by the same metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from keelwright.core.decoding import DecodingConfig
from keelwright.core.protocols import Judge, Suite
from keelwright.core.records import Item

Ask = Callable[[Sequence[Item]], list[str]]
"""Answers items greedily with the model under audit: for remedies that let the model think first."""


class Mitigation(Protocol):
    """A remedy at the prompt: the same items, asked in another way."""

    name: str
    says: str
    """One sentence: what it does to a prompt, and what it costs."""

    def rewrite(self, items: Sequence[Item], ask: Ask) -> list[Item]:
        """Return the items with other prompts or system messages, in order; ids, kinds and facts stay."""


@dataclass(frozen=True, slots=True)
class SetFacts:
    """What a report says of one set of items."""

    name: str
    title: str
    licence: str | None
    digest: str
    """Of the whole set, before any limit."""
    n: int
    caution: str = ""
    """What figures on this set do not mean."""


@dataclass(frozen=True, slots=True)
class Part:
    """Items that are asked in one way."""

    name: str
    says: str
    items: tuple[Item, ...]
    judges: tuple[Judge, ...]
    """The first one's verdict is the record's label."""
    panel: tuple[str, ...]
    """The judges in the user's words: their ids may need an open model."""
    decoding: DecodingConfig
    metrics: tuple[str, ...]
    """Beside the headline rates; see `measure.metric_table`."""
    headline: bool = True
    """Whether the headline rates (refusals, over-refusal, answers, incoherence) speak of these items."""
    knows_harm: bool = False
    """Whether the first judge tells a harmful answer from a harmless one."""
    sets: tuple[SetFacts, ...] = ()
    mitigation: Mitigation | None = None

    @property
    def digests(self) -> Mapping[str, str]:
        """Digest of each set that the items come from."""
        return {one.name: one.digest for one in self.sets}


@dataclass(frozen=True, slots=True)
class PartSpec:
    """A part as a suite's YAML file describes it; unknown keys are errors."""

    sets: tuple[str, ...] = ()
    """Names of data sets (see docs/reference/data-sets.md), or `core` and `workshop`."""
    builder: str = "plain"
    """How sets become items: `plain`, `wrapped`, `user-specific`, `code-robustness` or
    `continuations`."""
    judges: tuple[str, ...] = ("refusal-lists",)
    """Judges; the first one's verdict is the record's label."""
    metrics: tuple[str, ...] = ()
    """Beside the headline rates."""
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    """Answers per item."""
    headline: bool = True
    """Whether the headline rates (refusals, over-refusal, answers, incoherence) speak of these items."""
    knows_harm: bool = False
    """Whether the first judge tells a harmful answer from a harmless one."""
    name: str = ""
    """Empty: the suite's name."""
    says: str = ""
    """Empty: the suite's sentence."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the sets (by set name) and of the builder."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a builder makes of sets."""

    items: tuple[Item, ...]
    sets: tuple[SetFacts, ...]


def part_of_suite(suite: Suite, items: Sequence[Item], digest: str, decoding: DecodingConfig) -> Part:
    """Return a built-in suite as a part.

    Args:
        suite: `core`, `workshop`, or any that meets the protocol.
        items: Its items, as far as they are asked.
        digest: Of all its items.
        decoding: How to ask them.
    """
    judge = suite.judge()
    return Part(
        name=suite.name,
        says=suite.says,
        items=tuple(items),
        judges=(judge,),
        panel=(judge.judge_id,),
        decoding=decoding,
        metrics=("contrast_gap", "balanced_refusal_accuracy") if any(one.kind == "contrast" for one in items) else (),
        knows_harm=suite.knows_harm,
        sets=(SetFacts(suite.name, suite.name, None, digest, len(items)),),
    )
