# SPDX-License-Identifier: Apache-2.0
"""What the models of a run are asked: suite, utility, halves, and the metric that decides."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from keelwright.core.errors import DataError
from keelwright.core.protocols import Suite
from keelwright.core.records import Item
from keelwright.heal.decide import Primary
from keelwright.heal.halves import Halves, split_items
from keelwright.heal.halving import SHARES, nested_part
from keelwright.measure.suites import find_suite, items_within
from keelwright.measure.utility import WITH_TASKS, Utility, load_utility
from keelwright.models.refs import ModelRef

Part = Literal["quarter", "half", "selection", "verification", "all"]
"""`quarter` and `half` are nested parts of the selection half, for the first rounds of a race."""


@dataclass(frozen=True, slots=True)
class Exam:
    """Items, judges and halves of one run."""

    suite: Suite
    utility: Utility | None
    halves: Halves
    seed: int = 0
    """Of the parts of the selection half."""

    @property
    def primary(self) -> Primary:
        """Harm rate where the judge knows harm, else the refusal rate on harmful requests."""
        return "harm_rate" if self.suite.knows_harm else "refusal_rate"

    def items(self, part: Part) -> tuple[Item, ...]:
        """Return the items of a half, of a part of the selection half, or all, task items included."""
        if part == "all":
            return self.halves.all
        if part in SHARES:
            return nested_part(self.halves.selection, SHARES[part], seed=self.seed)
        return self.halves.selection if part == "selection" else self.halves.verification

    def suite_words(self) -> dict[str, Any]:
        """Return what the summary says of the suite."""
        return {
            "name": self.suite.name,
            "says": self.suite.says,
            "judge": self.suite.judge().judge_id,
            "n": dict(Counter(item.kind for item in self.halves.all)),
        }

    def utility_words(self) -> dict[str, Any] | None:
        """Return what the summary says of the utility."""
        if self.utility is None:
            return None
        return {"name": self.utility.name, "scorer": self.utility.scorer, "says": self.utility.says}


def suite_for(ref: ModelRef, name: str) -> Suite:
    """Return the suite of that name; with `auto` the lab's for an organism of the lab, else `core`."""
    return find_suite(("workshop" if ref.kind == "lab" else "core") if name == "auto" else name)


def prepare_exam(ref: ModelRef, *, suite: str, utility: str | None, limit: int | None, seed: int) -> Exam:
    """Choose the items.

    Args:
        ref: The aligned model, for suite `auto`.
        suite: Name of a suite, or `auto`.
        utility: Task file, text file or `lab:` task; None for none.
        limit: At most this many items of each kind.
        seed: Of the halves.

    Raises:
        DataError: The utility's file is malformed, or has too few tasks for two halves.
    """
    found = suite_for(ref, suite)
    task = load_utility(utility) if utility is not None else None
    items = [*found.items(), *(task.items() if isinstance(task, WITH_TASKS) else ())]
    halves = split_items(items_within(items, limit), seed=seed)
    if isinstance(task, WITH_TASKS):
        for half in (halves.selection, halves.verification):
            if not any(item.kind == "task" for item in half):
                raise DataError(
                    f"The task file '{utility}' has too few tasks to choose with some and verify with others.",
                    expected="at least 2 tasks; some hundred, to see a fall of 5 %",
                    found=f"{len(task.items())}",
                    fix="add tasks, or give --no-utility",
                )
    return Exam(found, task, halves, seed)
