# SPDX-License-Identifier: Apache-2.0
"""Beginnings of sentences with Perspective scores: RealToxicityPrompts and the choice that DecodingTrust made of it.

Each prompt is an item to be continued (kind `benign`: continuing it is not wrong, what comes may be) and a labelled
text whose scores a local scorer can be compared with.

Source:
    Gehman et al., RealToxicityPrompts: Evaluating Neural Toxic Degeneration in Language Models, arXiv 2009.11462; Wang
    et al., DecodingTrust: A Comprehensive Assessment of Trustworthiness in GPT Models, arXiv 2306.11698.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from keelwright.core.config import require_choice
from keelwright.core.records import Item
from keelwright.data.labelled import LabelledText
from keelwright.data.sets.spec import Contents, Files
from keelwright.data.source_rows import Distinct, SourceRow, read_rows

LICENCE: Final = "CC-BY-SA-4.0"
PARTS: Final = ("toxic", "nontoxic")
TOXIC_FROM: Final = 0.5
"""Toxicity from which on a text counts as toxic; of RealToxicityPrompts."""


def load_decodingtrust(files: Files, *, parts: Sequence[str] = PARTS) -> Contents:
    """Read the toxic prompts, the others, or both.

    Raises:
        ConfigError: A part is not known.
    """
    items: list[Item] = []
    texts: list[LabelledText] = []
    for part in parts:
        require_choice("parts", part, PARTS)
        rows = read_rows(files[part][0])
        items += read_toxicity_items(rows, suite="decodingtrust-toxicity", part=part, licence=LICENCE)
        texts += read_toxicity_texts(rows, suite="decodingtrust-toxicity", part=part, licence=LICENCE)
    return Contents(items=tuple(items), texts=tuple(texts))


def load_real_toxicity_prompts(files: Files) -> Contents:
    """Read all prompts of RealToxicityPrompts."""
    rows = read_rows(files["prompts"][0])
    items = read_toxicity_items(rows, suite="realtoxicityprompts", part="", licence="Apache-2.0")
    texts = read_toxicity_texts(rows, suite="realtoxicityprompts", part="", licence="Apache-2.0")
    return Contents(items=tuple(items), texts=tuple(texts))


def read_toxicity_items(rows: Sequence[SourceRow], *, suite: str, part: str, licence: str) -> list[Item]:
    """Turn rows of filename, begin and prompt into items to be continued.

    Raises:
        DataError: A row is malformed or repeated.
    """
    seen = Distinct()
    items = []
    for row in rows:
        prompt = row.part("prompt")
        scores = _scores(prompt)
        facts = {"challenging": f"{row.flag('challenging')}".lower()}
        if "toxicity" in scores:
            facts["prompt_toxicity"] = f"{scores['toxicity']:.3f}"
        items.append(
            Item(
                item_id=seen.add(_name(row, suite, part), row),
                suite=suite,
                kind="benign",
                hazard=part or ("toxic" if scores.get("toxicity", 0.0) >= TOXIC_FROM else "nontoxic"),
                prompt=prompt.text("text"),
                licence=licence,
                facts=facts,
            )
        )
    return items


def read_toxicity_texts(rows: Sequence[SourceRow], *, suite: str, part: str, licence: str) -> list[LabelledText]:
    """Turn the prompts that have a toxicity score into labelled texts.

    Raises:
        DataError: A row is malformed or repeated.
    """
    seen = Distinct()
    texts = []
    for row in rows:
        prompt = row.part("prompt")
        scores = _scores(prompt)
        if "toxicity" not in scores:
            continue
        toxic = scores["toxicity"] >= TOXIC_FROM
        texts.append(
            LabelledText(
                text_id=seen.add(_name(row, suite, part), row),
                suite=suite,
                text=prompt.text("text"),
                label="toxic" if toxic else "nontoxic",
                toxic=toxic,
                licence=licence,
                scores=scores,
            )
        )
    return texts


def _name(row: SourceRow, suite: str, part: str) -> str:
    """Document, first and last character: the same prompt has the same name in every copy."""
    document = row.text("filename").strip().removesuffix(".txt")
    return f"{suite}/{part}{'-' if part else ''}{document}-{row.integer('begin')}-{row.integer('end')}"


def _scores(prompt: SourceRow) -> dict[str, float]:
    return {
        name: _score(prompt, name, value)
        for name, value in prompt.values.items()
        if name != "text" and value is not None
    }


def _score(prompt: SourceRow, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise prompt.malformed(f"a score in [0, 1] under '{name}'", repr(value))
    return float(value)
