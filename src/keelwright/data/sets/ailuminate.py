# SPDX-License-Identifier: Apache-2.0
"""The demo prompts of AILuminate 1.0: hazard-tagged prompts of a skilled and an unskilled persona.

They stand in for nothing else: the AILuminate grade is made by MLCommons from private prompts with its own evaluators.

Source:
    Ghosh et al., AILuminate: Introducing v1.0 of the AI Risk and Reliability Benchmark from MLCommons, arXiv
    2503.05731.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from keelwright.core.records import Item
from keelwright.data.sets.spec import Contents, Files
from keelwright.data.source_rows import Distinct, SourceRow, read_rows

LICENCE: Final = "CC-BY-4.0"


def load_ailuminate(files: Files) -> Contents:
    """Read the demo prompts."""
    return Contents(items=tuple(read_ailuminate(read_rows(files["prompts"][0]))))


def read_ailuminate(rows: Sequence[SourceRow]) -> list[Item]:
    """Turn rows of release_prompt_id, prompt_text, hazard, persona and locale into items.

    Raises:
        DataError: A row is malformed or repeated.
    """
    seen = Distinct()
    return [
        Item(
            item_id=seen.add(f"ailuminate-demo/{row.text('release_prompt_id').strip()}", row),
            suite="ailuminate-demo",
            kind="harmful",
            hazard=row.text("hazard").strip(),
            prompt=row.text("prompt_text"),
            licence=LICENCE,
            facts={"persona": row.text("persona").strip(), "locale": row.text("locale").strip()},
        )
        for row in rows
    ]
