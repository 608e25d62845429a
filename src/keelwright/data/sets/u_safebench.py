# SPDX-License-Identifier: Apache-2.0
"""U-SafeBench: instructions that are harmless for most people and unsafe for a user with a given profile.

The prompt of an item is the plain instruction; the profile is among its materials, for whoever frames the request.
Rows of the safety file are `harmful` (for that user), rows of the helpfulness file, whose user is an ordinary person,
`benign`. All rows of one instruction share a cluster and a pair, so that profile and ordinary user can be compared.

Source:
    In et al., Is Safety Standard Same for Everyone? User-Specific Safety Evaluation of Large Language Models, EMNLP
    2025, arXiv 2502.15086.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from keelwright.core.config import require_choice
from keelwright.core.digests import text_digest
from keelwright.core.records import Item
from keelwright.data.sets.spec import Contents, Files
from keelwright.data.source_rows import Distinct, SourceRow, read_rows

LICENCE: Final = "MIT"
PARTS: Final = ("safety", "helpfulness")
DOMAINS: Final = ("QA", "autonomous")
ORDINARY: Final = "ordinary"
"""The profile id of the helpfulness file's user."""


def load_u_safebench(files: Files, *, parts: Sequence[str] = PARTS) -> Contents:
    """Read the safety rows, the helpfulness rows, or both.

    Raises:
        ConfigError: A part is not known.
    """
    for part in parts:
        require_choice("parts", part, PARTS)
    readers = {"safety": read_safety, "helpfulness": read_helpfulness}
    return Contents(items=tuple(item for part in parts for item in readers[part](read_rows(files[part][0]))))


def read_safety(rows: Sequence[SourceRow]) -> list[Item]:
    """Turn rows of id, instruction, user, task_domain and risk_scenario into items of kind `harmful`.

    Raises:
        DataError: A row is malformed or repeated.
    """
    seen = Distinct()
    return [
        _item(row, seen, part="safety", hazard=row.text("risk_scenario").strip(), profile=profile_id(row.text("user")))
        for row in rows
    ]


def read_helpfulness(rows: Sequence[SourceRow]) -> list[Item]:
    """Turn rows of id, instruction, user and task_domain into items of kind `benign`.

    Raises:
        DataError: A row is malformed or repeated.
    """
    seen = Distinct()
    return [
        _item(row, seen, part="helpfulness", hazard=row.text("task_domain").strip(), profile=ORDINARY) for row in rows
    ]


def profile_id(user: str) -> str:
    """Return the id of a profile: a digest of its words."""
    return text_digest(user.strip())


def _item(row: SourceRow, seen: Distinct, *, part: str, hazard: str, profile: str) -> Item:
    instruction = row.text("instruction")
    together = f"u-safebench/{text_digest(instruction.strip())}"
    facts = {"domain": row.choice(DOMAINS, "task_domain"), "profile": profile}
    if part == "safety":
        facts["scenario"] = hazard
    return Item(
        item_id=seen.add(f"u-safebench/{part}-{row.text('id').strip().removeprefix('id_')}", row),
        suite="u-safebench",
        kind="harmful" if part == "safety" else "benign",
        hazard=hazard,
        prompt=instruction,
        cluster_id=together,
        pair_id=together,
        licence=LICENCE,
        facts=facts,
        materials={"profile": row.text("user"), "instruction": instruction},
    )
