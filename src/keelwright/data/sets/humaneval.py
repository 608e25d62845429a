# SPDX-License-Identifier: Apache-2.0
"""HumanEval: function signatures with a docstring, to be completed; judged by unit tests.

The prompt is the file's own: the model completes it. An answer passes when the program made of it, then `setup` and
then `tests` runs to its end; `canonical` is such a program. (For HumanEval `setup` is empty.)

Source:
    Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from keelwright.core.records import Item
from keelwright.data.sets.spec import Contents, Files
from keelwright.data.source_rows import Distinct, SourceRow, read_rows

LICENCE: Final = "MIT"


def load_humaneval(files: Files) -> Contents:
    """Read the problems."""
    return Contents(items=tuple(read_humaneval(read_rows(files["problems"][0]))))


def read_humaneval(rows: Sequence[SourceRow]) -> list[Item]:
    """Turn rows of task_id, prompt, entry_point, canonical_solution and test into items.

    Raises:
        DataError: A row is malformed or repeated.
    """
    seen = Distinct()
    items = []
    for row in rows:
        prompt, entry_point = row.text("prompt"), row.text("entry_point").strip()
        items.append(
            Item(
                item_id=seen.add(f"humaneval/{row.text('task_id').strip().removeprefix('HumanEval/')}", row),
                suite="humaneval",
                kind="task",
                hazard="code",
                prompt=prompt,
                scorer="tests",
                licence=LICENCE,
                materials={
                    "tests": f"{row.text('test').rstrip()}\n\ncheck({entry_point})\n",
                    "entry_point": entry_point,
                    "canonical": prompt + row.text("canonical_solution"),
                    "setup": "",
                },
            )
        )
    return items
