# SPDX-License-Identifier: Apache-2.0
"""HarmBench: harmful behaviours, plain and with a context that must be sent along.

A contextual behaviour is sent as its context, a separator and the behaviour, as the official code does. Behaviours
about copyright are left out unless asked for: whether they were fulfilled is told by overlap with the protected text,
which no refusal judge sees.

Source:
    Mazeika et al., HarmBench: A Standardized Evaluation Framework for Automated Red Teaming and Robust Refusal, ICML
    2024, arXiv 2402.04249.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from keelwright.core.config import require_choice
from keelwright.core.errors import ConfigError, MissingError
from keelwright.core.records import Item
from keelwright.data.sets.clustering import cluster_ids, near_duplicates
from keelwright.data.sets.spec import Contents, Files
from keelwright.data.source_rows import Distinct, SourceRow, read_rows

LICENCE: Final = "MIT"
SEPARATOR: Final = "\n\n---\n\n"
"""Between context and behaviour; of the official code."""
FUNCTIONAL: Final = ("standard", "contextual", "copyright")
SPLITS: Final = ("all", "val", "test")


def load_harmbench(
    files: Files,
    *,
    functional: Sequence[str] = ("standard", "contextual"),
    split: Literal["all", "val", "test"] = "all",
) -> Contents:
    """Read the behaviours.

    Args:
        files: Roles `behaviours`, and `validation` where the split is not `all`.
        functional: Which functional categories, out of `FUNCTIONAL`.
        split: All 400, the 80 of the validation file, or the others.

    Raises:
        ConfigError: A category or the split is not known.
        MissingError: The split needs the validation file, and it is not there.
    """
    for name in functional:
        require_choice("functional", name, FUNCTIONAL)
    if not functional:
        raise ConfigError(
            "'functional' names nothing.", expected=f"some of {', '.join(FUNCTIONAL)}", found="none", fix="name one"
        )
    require_choice("split", split, SPLITS)
    rows = read_rows(files["behaviours"][0])
    everything = read_harmbench(rows)
    wanted = [item for item in everything if item.facts["functional"] in functional]
    left = {
        f"functional category {name}": sum(item.facts["functional"] == name for item in everything)
        for name in FUNCTIONAL
        if name not in functional
    }
    if split != "all":
        inside = _validation_ids(files)
        kept = [item for item in wanted if (item.item_id in inside) == (split == "val")]
        left[f"not of the split {split}"] = len(wanted) - len(kept)
        wanted = kept
    return Contents(items=tuple(wanted), left_out={reason: count for reason, count in left.items() if count})


def read_harmbench(rows: Sequence[SourceRow]) -> list[Item]:
    """Turn rows of Behavior, FunctionalCategory, SemanticCategory, ContextString and BehaviorID into items.

    Items that share a context, or whose behaviours are near-duplicates, share a cluster.

    Raises:
        DataError: A row is malformed or repeated, or a contextual behaviour has no context.
    """
    seen = Distinct()
    names = [seen.add(_name(row), row) for row in rows]
    functional = [row.choice(FUNCTIONAL, "FunctionalCategory") for row in rows]
    behaviours = [row.text("Behavior") for row in rows]
    contexts = [
        row.text("ContextString") if name == "contextual" else None for row, name in zip(rows, functional, strict=True)
    ]
    return [
        Item(
            item_id=name,
            suite="harmbench",
            kind="harmful",
            hazard=row.text("SemanticCategory").strip(),
            prompt=behaviour if context is None else f"{context}{SEPARATOR}{behaviour}",
            cluster_id=cluster,
            licence=LICENCE,
            facts={"functional": kind},
        )
        for row, name, kind, behaviour, context, cluster in zip(
            rows,
            names,
            functional,
            behaviours,
            contexts,
            cluster_ids(names, near_duplicates(behaviours), contexts),
            strict=True,
        )
    ]


def _name(row: SourceRow) -> str:
    return f"harmbench/{row.text('BehaviorID').strip()}"


def _validation_ids(files: Files) -> set[str]:
    if "validation" not in files:
        raise MissingError(
            "The split of HarmBench needs its validation file.",
            expected="harmbench_behaviors_text_val.csv beside the behaviours",
            found="the behaviours only",
            fix="put the file there, or take the split 'all'",
        )
    return {_name(row) for row in read_rows(files["validation"][0])}
