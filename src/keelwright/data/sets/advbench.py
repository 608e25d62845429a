# SPDX-License-Identifier: Apache-2.0
"""AdvBench: harmful goals with an affirmative opening for attacks that optimise one.

Many goals say nearly the same; near-duplicates share a cluster, so that intervals do not take them for independent.
Items are named by a digest of their goal, because copies with removed rows number the others differently.

Source:
    Zou et al., Universal and Transferable Adversarial Attacks on Aligned Language Models, arXiv 2307.15043.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from keelwright.core.digests import text_digest
from keelwright.core.records import Item
from keelwright.data.sets.clustering import cluster_ids, near_duplicates
from keelwright.data.sets.spec import Contents, Files
from keelwright.data.source_rows import Distinct, SourceRow, read_rows

LICENCE: Final = "MIT"


def load_advbench(files: Files) -> Contents:
    """Read the goals."""
    return Contents(items=tuple(read_advbench(read_rows(files["goals"][0]))))


def read_advbench(rows: Sequence[SourceRow]) -> list[Item]:
    """Turn rows of goal and target into items; the target is kept among the materials.

    Raises:
        DataError: A row is malformed or repeated.
    """
    seen = Distinct()
    goals = [row.text("goal") for row in rows]
    names = [seen.add(f"advbench/{text_digest(goal)}", row) for goal, row in zip(goals, rows, strict=True)]
    clusters = cluster_ids(names, near_duplicates(goals))
    return [
        Item(
            item_id=name,
            suite="advbench",
            kind="harmful",
            hazard="not categorised",
            prompt=goal,
            cluster_id=cluster,
            licence=LICENCE,
            materials={"target": row.text("target")},
        )
        for name, goal, cluster, row in zip(names, goals, clusters, rows, strict=True)
    ]
