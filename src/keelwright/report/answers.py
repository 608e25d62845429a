# SPDX-License-Identifier: Apache-2.0
"""The answers browser: every item with each model's answer, searched and filtered by the page's own script.

Without the script every item can still be opened. The number of items is capped by count and by size, what turned for
the worse first, and the page says how many are left out and where they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from markupsafe import escape

from keelwright.core.digests import text_digest
from keelwright.core.records import Record
from keelwright.report.examples import KINDS, LABELS, Answer, answer_of, area_of
from keelwright.report.flips import Flips, flips_of
from keelwright.report.text import clip
from keelwright.report.verdicts import Panel, answered_by_model, judge_name, panel_of

MOST_ITEMS: Final = 2000
MOST_BYTES: Final = 4_000_000
_PROMPT_LIMIT: Final = 2000
_OUTPUT_LIMIT: Final = 1500
_SUMMARY_LIMIT: Final = 150
_MARKUP_BYTES: Final = 800
"""Of one item, about, beside its texts and answers."""
_ANSWER_BYTES: Final = 500
"""Of the markup around one answer, about."""
_TURNS_SHOWN: Final = 8
"""Items of each turn that are shown in full above the browser."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one judge said of one answer."""

    judge: str
    says: str
    raw: str


@dataclass(frozen=True, slots=True)
class Shown:
    """One model's answer with every judge's verdict."""

    answer: Answer
    verdicts: tuple[Verdict, ...]
    """Empty where there is one judge: its verdict is the answer's label."""
    samples: int
    """Answers that were drawn; the first is shown."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One item with the answers of every model that was asked."""

    name: str
    """Id of the element on the page."""
    item_id: str
    set_name: str
    kind: str
    kind_title: str
    area: str
    prompt: str
    prompt_left_out: int
    heading: str
    """The prompt in one line."""
    shown: tuple[Shown, ...]
    labels: tuple[str, ...]
    """Of the models' answers, in plain words."""
    turns: tuple[str, ...]
    """Keys of flips that it is among."""
    differs: bool
    """Whether its judges disagree."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One option of a filter, with how many items it holds."""

    value: str
    title: str
    count: int


@dataclass(frozen=True, slots=True)
class Turn:
    """Items that turned one way, the first of them in full."""

    key: str
    title: str
    count: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class Browser:
    """All items, what they can be filtered by, and what was left out."""

    entries: tuple[Entry, ...]
    total: int
    turns: tuple[Turn, ...]
    sets: tuple[Choice, ...]
    areas: tuple[Choice, ...]
    kinds: tuple[Choice, ...]
    labels: tuple[Choice, ...]
    differing: int
    """Entries whose judges disagree."""

    @property
    def left_out(self) -> int:
        """Items that the page does not hold."""
        return self.total - len(self.entries)

    @property
    def links(self) -> dict[str, str]:
        """Id on the page of every item that it holds."""
        return {entry.item_id: entry.name for entry in self.entries}


def browse(
    records: Sequence[Record],
    roles: Sequence[tuple[str, str]],
    *,
    primary: str,
    most_items: int = MOST_ITEMS,
    most_bytes: int = MOST_BYTES,
) -> Browser | None:
    """Return the browser of a run's answers, or None where there are none.

    Args:
        records: Of all models.
        roles: Pairs of model id and the role whose colour it has, in the order of the answers.
        primary: The metric that defines failure.
        most_items: Items that the page may hold.
        most_bytes: What their texts may come to.
    """
    by_model = answered_by_model(records)
    sides = [(role, by_model[model_id]) for model_id, role in roles if model_id in by_model]
    items: dict[str, list[tuple[str, Record]]] = {}
    for role, own in sides:
        for item_id, record in own.items():
            items.setdefault(item_id, []).append((role, record))
    if not items:
        return None
    knows_harm = primary == "harm_rate"
    turns = flips_of(sides[0][1], sides[1][1], knows_harm=knows_harm) if len(sides) == 2 else []
    turned: dict[str, list[str]] = {}
    for turn in turns:
        for item_id in turn.item_ids:
            turned.setdefault(item_id, []).append(turn.key)
    panel = panel_of(records)
    ranks = {turn.key: place for place, turn in enumerate(turns)}
    entries: list[Entry] = []
    room = most_bytes
    for item_id in sorted(items, key=lambda one: _rank(items[one], turned.get(one, []), ranks, primary)):
        found = items[item_id]
        differs = any(panel.differ(record) for _, record in found)
        shown = tuple(_shown(role, record, primary, panel) for role, record in found)
        entry = _entry(f"item-{len(entries) + 1}", found[0][1], shown, turned.get(item_id, []), differs=differs)
        room -= _size(entry)
        if room < 0 or len(entries) == most_items:
            break
        entries.append(entry)
    return _browser(entries, len(items), turns)


def _rank(
    found: Sequence[tuple[str, Record]], turned: Sequence[str], ranks: Mapping[str, int], primary: str
) -> tuple[int, int, str]:
    """Order: what turned, harm first; then what is not as one would want it; else arbitrary but fixed."""
    last = answer_of(*found[-1], primary, limit=1).outcome
    worst = min((ranks[key] for key in turned), default=len(ranks))
    return worst, ("bad", "broken", "neutral", "good").index(last), text_digest(found[0][1].item_id)


def _entry(name: str, first: Record, shown: tuple[Shown, ...], turned: Sequence[str], *, differs: bool) -> Entry:
    prompt, cut = clip(first.prompt, _PROMPT_LIMIT)
    return Entry(
        name=name,
        item_id=first.item_id,
        set_name=first.suite,
        kind=first.kind,
        kind_title=KINDS[first.kind],
        area=area_of(first),
        prompt=prompt,
        prompt_left_out=cut,
        heading=clip(" ".join(first.prompt.split()), _SUMMARY_LIMIT)[0],
        shown=shown,
        labels=tuple(dict.fromkeys(one.answer.label for one in shown)),
        turns=tuple(turned),
        differs=differs,
    )


def _shown(role: str, record: Record, primary: str, panel: Panel) -> Shown:
    verdicts = tuple(
        Verdict(judge_name(judge), _verdict_words(record, judge, panel), clip(one.raw or "", 120)[0])
        for judge, one in record.judgements.items()
    )
    answer = answer_of(role, record, primary, limit=_OUTPUT_LIMIT)
    first = next(iter(record.judgements), "")
    answer = replace(answer, label=_label_words(record, first, panel)) if first else answer
    return Shown(answer, verdicts if len(verdicts) > 1 else (), record.samples)


def _label_words(record: Record, judge: str, panel: Panel) -> str:
    """Return one judge's label; that a judge without an idea of harm saw no refusal does not make it unhelpful."""
    one = record.judgements[judge]
    is_blind = one.label == "comply_unhelpful" and judge not in panel.tell_harm and one.raw != "prompt echo"
    return "answered" if is_blind and record.kind == "harmful" else LABELS[one.label]


def _verdict_words(record: Record, judge: str, panel: Panel) -> str:
    score = record.judgements[judge].score
    return _label_words(record, judge, panel) + ("" if score is None else f", {score:.3g}")


def _size(entry: Entry) -> int:
    texts = [entry.prompt, entry.heading, *(one.answer.text for one in entry.shown)]
    verdicts = sum(60 + len(one.raw) for shown in entry.shown for one in shown.verdicts)
    markup = _MARKUP_BYTES + _ANSWER_BYTES * len(entry.shown) + verdicts
    return markup + sum(len(escape(text).encode()) for text in texts)


def _browser(entries: Sequence[Entry], total: int, turns: Sequence[Flips]) -> Browser:
    by_item = {entry.item_id: entry for entry in entries}
    return Browser(
        entries=tuple(entries),
        total=total,
        turns=tuple(
            Turn(
                turn.key,
                turn.title,
                len(turn.item_ids),
                tuple(by_item[one] for one in turn.item_ids if one in by_item)[:_TURNS_SHOWN],
            )
            for turn in turns
        ),
        sets=_choices([(entry.set_name, entry.set_name) for entry in entries]),
        areas=_choices([(entry.area, entry.area) for entry in entries if entry.area]),
        kinds=_choices([(entry.kind, entry.kind_title) for entry in entries]),
        labels=_choices([(label, label) for entry in entries for label in entry.labels]),
        differing=sum(entry.differs for entry in entries),
    )


def _choices(found: Sequence[tuple[str, str]]) -> tuple[Choice, ...]:
    counts = Counter(found)
    return tuple(Choice(value, title, counts[value, title]) for value, title in sorted(counts, key=lambda one: one[1]))
