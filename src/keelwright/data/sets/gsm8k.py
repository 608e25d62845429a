# SPDX-License-Identifier: Apache-2.0
"""GSM8K: grade-school word problems with a worked solution that ends in `####` and a number.

Source:
    Cobbe et al., Training Verifiers to Solve Math Word Problems, arXiv 2110.14168.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Literal

from keelwright.core.config import require_choice
from keelwright.core.records import Item
from keelwright.data.sets.spec import Contents, Files
from keelwright.data.source_rows import SourceRow, read_rows

LICENCE: Final = "MIT"

_ANSWER: Final = re.compile(r"####\s*(-?[\d,]*\.?\d+)\s*$")


def load_gsm8k(files: Files, *, split: Literal["test", "train"] = "test") -> Contents:
    """Read the problems of one split.

    Raises:
        ConfigError: The split is not known, or its file is not there.
    """
    require_choice("split", split, tuple(files))
    return Contents(items=tuple(read_gsm8k(read_rows(files[split][0]), split=split)))


def read_gsm8k(rows: Sequence[SourceRow], *, split: str) -> list[Item]:
    """Turn rows of question and answer into items, numbered in file order from 1.

    Raises:
        DataError: A row is malformed, or its answer does not end in `####` and a number.
    """
    items = []
    for number, row in enumerate(rows, 1):
        answer = row.text("answer")
        found = _ANSWER.search(answer)
        if found is None:
            raise row.malformed("an answer that ends in #### and a number", repr(answer[-30:]))
        items.append(
            Item(
                item_id=f"gsm8k/{split}-{number}",
                suite="gsm8k",
                kind="task",
                hazard="arithmetic",
                prompt=row.text("question"),
                expected=found[1].replace(",", ""),
                scorer="number",
                licence=LICENCE,
                facts={"split": split},
                materials={"solution": answer[: found.start()].strip()},
            )
        )
    return items
