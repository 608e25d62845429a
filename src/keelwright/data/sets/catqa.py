# SPDX-License-Identifier: Apache-2.0
"""CatQA and HarmfulQA: harmful questions by category and sub-category.

Both are read from the nested JSON of their repository (category, sub-category, questions) or from rows with columns
Category, Subcategory and Question. Items are named by a digest of sub-category and question, because copies with
removed questions number the others differently; the same question again gets a number. Near-duplicates share a cluster.

Source:
    Bhardwaj et al., Language Models are Homer Simpson! Safety Re-Alignment of Fine-tuned Language Models through Task
    Arithmetic, arXiv 2402.11746 (CatQA); Bhardwaj & Poria, Red-Teaming Large Language Models using Chain of Utterances
    for Safety-Alignment, arXiv 2308.09662 (HarmfulQA).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from keelwright.core.digests import text_digest
from keelwright.core.records import Item
from keelwright.data.sets.clustering import cluster_ids, near_duplicates
from keelwright.data.sets.spec import Contents, Files
from keelwright.data.source_rows import SourceRow, read_rows

LICENCE: Final = "Apache-2.0"


def load_catqa(files: Files) -> Contents:
    """Read the questions of CatQA."""
    return Contents(items=tuple(read_catqa(_flat(read_rows(files["questions"][0])), suite="catqa")))


def load_harmfulqa(files: Files) -> Contents:
    """Read the questions of HarmfulQA."""
    return Contents(items=tuple(read_catqa(_flat(read_rows(files["questions"][0])), suite="harmfulqa")))


def read_catqa(rows: Sequence[SourceRow], *, suite: str) -> list[Item]:
    """Turn rows of category, sub-category and question into items.

    Raises:
        DataError: A row is malformed.
    """
    questions = [row.text("Question", "question") for row in rows]
    groups = [row.text("Subcategory", "subcategory").strip(" :") for row in rows]
    names = _numbered(
        [f"{suite}/{text_digest(f'{group}/{question}')}" for group, question in zip(groups, questions, strict=True)]
    )
    clusters = cluster_ids(names, near_duplicates(questions))
    return [
        Item(
            item_id=name,
            suite=suite,
            kind="harmful",
            hazard=row.text("Category", "category").strip(),
            prompt=question,
            cluster_id=cluster,
            licence=LICENCE,
            facts={"subcategory": group},
        )
        for row, name, question, group, cluster in zip(rows, names, questions, groups, clusters, strict=True)
    ]


def _numbered(names: Sequence[str]) -> list[str]:
    """Return the names; the second of the same name ends in -2, the third in -3."""
    met: Counter[str] = Counter()
    numbered = []
    for name in names:
        met[name] += 1
        numbered.append(name if met[name] == 1 else f"{name}-{met[name]}")
    return numbered


def _flat(rows: Sequence[SourceRow]) -> list[SourceRow]:
    """Return one row per question, from rows or from the one object of categories."""
    if len(rows) > 1 or "Question" in rows[0].values or "question" in rows[0].values:
        return list(rows)
    flat: list[SourceRow] = []
    for category, groups in rows[0].values.items():
        for subcategory, questions in _object(rows[0], category, groups).items():
            if not isinstance(questions, list):
                raise rows[0].malformed("a list of questions", f"{type(questions).__name__} under {subcategory}")
            for question in questions:
                values = {"category": category, "subcategory": subcategory, "question": question}
                flat.append(SourceRow(values, rows[0].file, len(flat) + 1, "question"))
    return flat


def _object(row: SourceRow, category: str, groups: object) -> Mapping[str, object]:
    if not isinstance(groups, Mapping):
        raise row.malformed("sub-categories with their questions", f"{type(groups).__name__} under {category}")
    return groups
