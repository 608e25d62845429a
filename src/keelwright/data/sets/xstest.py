# SPDX-License-Identifier: Apache-2.0
"""XSTest: safe prompts that look unsafe, their unsafe contrasts, and answers that people labelled.

Safe prompts are of kind `contrast` (refusing them is over-refusal), unsafe ones of kind `harmful`. Where the file
gives a focus, prompts of one topic and focus share a cluster, and the k-th safe prompt of a focus is paired with the
k-th unsafe one.

Source:
    Röttger et al., XSTest: A Test Suite for Identifying Exaggerated Safety Behaviours in Large Language Models, NAACL
    2024, arXiv 2308.01263.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from keelwright.core.records import Item, Kind
from keelwright.data.labelled import AnswerLabel, LabelledAnswer
from keelwright.data.sets.spec import Contents, Files
from keelwright.data.source_rows import Distinct, SourceRow, read_rows

LICENCE: Final = "CC-BY-4.0"

_CONTRAST: Final = "contrast_"
_TOPICS: Final = {
    "real_group_nons_discr": "discr",
    "nons_group_real_discr": "discr",
    "privacy_public": "privacy",
    "privacy_fictional": "privacy",
}
"""Safe types that share one contrast type."""
_UNPAIRED: Final = ("nons_group_real_discr", "privacy_public")
"""Of two safe types with one contrast type, the one that the contrasts were not written from."""
_LABELS: Final[Mapping[str, AnswerLabel]] = {
    "1_full_compliance": "compliance",
    "2_full_refusal": "refusal_full",
    "3_partial_refusal": "refusal_partial",
}


def load_xstest(files: Files) -> Contents:
    """Read the prompts."""
    return Contents(items=tuple(read_xstest(read_rows(files["prompts"][0]))))


def load_xstest_answers(files: Files) -> Contents:
    """Read the labelled answers of every model whose file is there."""
    answers = [
        answer for model, paths in files.items() for answer in read_xstest_answers(read_rows(paths[0]), model=model)
    ]
    return Contents(answers=tuple(answers))


def read_xstest(rows: Sequence[SourceRow]) -> list[Item]:
    """Turn rows of id, prompt, type, label, focus and note into items.

    Raises:
        DataError: A row is malformed, repeated, or its type and label disagree.
    """
    seen = Distinct()
    pairs = _pairs(rows)
    items = []
    for row in rows:
        name, type_ = seen.add(_name(row), row), row.text("type").strip()
        label = row.choice(("safe", "unsafe"), "label")
        if (label == "unsafe") != type_.startswith(_CONTRAST):
            raise row.malformed(f"unsafe prompts, and no others, under types {_CONTRAST}*", f"{label} under {type_}")
        focus = row.maybe("focus")
        facts = {"type": type_, "focus": focus, "note": row.maybe("note")}
        items.append(
            Item(
                item_id=name,
                suite="xstest",
                kind=_kind(type_),
                hazard=type_,
                prompt=row.text("prompt"),
                cluster_id=f"xstest/{_topic(type_)}/{focus}" if focus else None,
                pair_id=pairs.get(name),
                licence=LICENCE,
                facts={key: value for key, value in facts.items() if value},
            )
        )
    return items


def read_xstest_answers(rows: Sequence[SourceRow], *, model: str) -> list[LabelledAnswer]:
    """Turn rows of id, type, prompt, completion and labels into labelled answers of one model.

    Raises:
        DataError: A row is malformed or repeated, or a label is not one of the three.
    """
    seen = Distinct()
    answers = []
    for row in rows:
        type_ = row.text("type").strip()
        item = Item(
            item_id=seen.add(_name(row), row),
            suite="xstest",
            kind=_kind(type_),
            hazard=type_,
            prompt=row.text("prompt"),
            licence=LICENCE,
            facts={"type": type_},
        )
        people = [name for name in ("annotation_1", "annotation_2") if row.maybe(name)]
        machines = {name: row.maybe(name) for name in ("gpt4_label", "strmatch_label") if row.maybe(name)}
        answers.append(
            LabelledAnswer(
                item=item,
                answer=row.text("completion"),
                label=_label(row, "final_label"),
                model=model,
                annotations=tuple(_label(row, name) for name in people),
                machine_labels=machines,
            )
        )
    return answers


def _name(row: SourceRow) -> str:
    """The prompts are numbered 1, 2, ...; the answers v2-1, v2-2, ..."""
    return f"xstest/v2-{row.text('id').strip().removeprefix('v2-')}"


def _kind(type_: str) -> Kind:
    return "harmful" if type_.startswith(_CONTRAST) else "contrast"


def _topic(type_: str) -> str:
    plain = type_.removeprefix(_CONTRAST)
    return _TOPICS.get(plain, plain)


def _label(row: SourceRow, name: str) -> AnswerLabel:
    return _LABELS[row.choice(tuple(_LABELS), name)]


def _pairs(rows: Sequence[SourceRow]) -> dict[str, str]:
    """Return the pair of each prompt that has one, by item id."""
    counts: Counter[tuple[str, str]] = Counter()
    sides: dict[str, list[str]] = {}
    for row in rows:
        type_, focus = row.text("type").strip(), row.maybe("focus")
        if not focus or type_ in _UNPAIRED:
            continue
        counts[type_, focus] += 1
        sides.setdefault(f"xstest/{_topic(type_)}/{focus}/{counts[type_, focus]}", []).append(_name(row))
    return {name: pair for pair, names in sides.items() if len(names) > 1 for name in names}
