# SPDX-License-Identifier: Apache-2.0
"""What people have judged: answers of models and texts, with their labels. Judges are measured against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from keelwright.core.records import Item

AnswerLabel = Literal["compliance", "refusal_full", "refusal_partial"]
"""What a person saw in an answer: it does what was asked, it declines, or it declines in part."""


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """One answer of a model to an item, as people labelled it."""

    item: Item
    answer: str
    label: AnswerLabel
    """The label that the people settled on."""
    model: str
    """Which model answered, in the words of the set."""
    annotations: tuple[AnswerLabel, ...] = ()
    """What each person said on their own."""
    machine_labels: Mapping[str, str] = field(default_factory=dict)
    """What programs said, in the words of the file: not gold, and not always a label."""


@dataclass(frozen=True, slots=True)
class LabelledText:
    """One text and what people, or the set's authors, say about it."""

    text_id: str
    suite: str
    text: str
    label: str
    """In the words of the set."""
    toxic: bool
    """Whether the label counts as toxic, hateful or offensive."""
    licence: str | None = None
    cluster_id: str | None = None
    """Texts with the same id were made from one template."""
    facts: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    """Scores in 0..1 that come with the text, by name."""
