# SPDX-License-Identifier: Apache-2.0
"""The builder `code-robustness`: every programming problem clean, and once per perturbation.

Settings: `perturbations` (the shipped set or a YAML file), `families` (only these), `placement` (of added text).
A limit counts problems: each comes with all its perturbations.

Source:
    arXiv 2411.19508; a reconstruction, as `data.perturb.apply` says.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import cast, get_args

from keelwright.core.config import require_choice
from keelwright.core.errors import DataError
from keelwright.core.records import Item
from keelwright.data.perturb.added_text import Placement
from keelwright.data.perturb.apply import perturb
from keelwright.data.perturb.perturbation import SHIPPED, PerturbationSet, read_perturbations
from keelwright.measure.builders.drawing import Load, Loaded, facts_of, read_sets, settings_of
from keelwright.measure.limits import sample_items
from keelwright.measure.part import Drawn, PartSpec, SetFacts


@dataclass(frozen=True, slots=True)
class CodeRobustnessConfig:
    """How problems are perturbed."""

    perturbations: str = SHIPPED
    """The shipped set, or the path of a file like it."""
    families: tuple[str, ...] | list[str] = ()
    """Only perturbations of these families; empty: all."""
    placement: str = "user_turn"
    """Added text stands after the problem in the user's turn (`user_turn`), or inside the code (`comment`)."""

    def __post_init__(self) -> None:
        require_choice("placement", self.placement, get_args(Placement))


def build(spec: PartSpec, load: Load, *, limit: int | None, seed: int) -> Drawn:
    """Return the problems of the part's sets, each clean and perturbed.

    Args:
        spec: The part; its sets hold items of kind `task` with unit tests.
        load: Reads a set by name.
        limit: At most this many problems of each set; None keeps all.
        seed: Of the limit and of what perturbations draw.

    Raises:
        ConfigError: A setting is wrong.
        DataError: A set holds no problems with tests, or the perturbations cannot be read.
    """
    config = settings_of(spec, CodeRobustnessConfig)
    perturbations = _chosen(read_perturbations(config.perturbations), config.families)
    sets = read_sets(spec, load)
    items: list[Item] = []
    left_out: dict[str, Counter[str]] = {}
    for loaded in sets:
        _require_tests(loaded)
        problems = sample_items(loaded.items, limit, seed=seed)
        made = perturb(
            problems, perturbations, seed=seed, placement=cast(Placement, config.placement), pool=loaded.items
        )
        items += made.items
        left_out[loaded.name] = Counter(made.left_out)
    wording = [perturbations.digest, [one.name for one in perturbations.perturbations], config.placement, seed]
    facts = facts_of(sets, items, wording=wording)
    return Drawn(tuple(items), tuple(_with_left_out(one, left_out[one.name]) for one in facts))


def _chosen(perturbations: PerturbationSet, families: tuple[str, ...] | list[str]) -> PerturbationSet:
    known = dict.fromkeys(one.family for one in perturbations.perturbations)
    for family in families:
        require_choice("families", family, known)
    kept = tuple(one for one in perturbations.perturbations if not families or one.family in families)
    return dataclasses.replace(perturbations, perturbations=kept)


def _with_left_out(facts: SetFacts, left_out: Counter[str]) -> SetFacts:
    """Return the facts with a sentence on the perturbations that some problems could not have."""
    if not left_out:
        return facts
    said = ", ".join(f"{name} on {count}" for name, count in left_out.items())
    return dataclasses.replace(
        facts, caution=f"{facts.caution} Problems without what a perturbation needs: {said}.".strip()
    )


def _require_tests(loaded: Loaded) -> None:
    for item in loaded.items:
        if item.kind != "task" or not item.materials.get("tests"):
            raise DataError(
                f"The set '{loaded.name}' holds no programming problems.",
                expected="items of kind task with unit tests",
                found=f"'{item.item_id}' of kind {item.kind}{' without tests' if item.kind == 'task' else ''}",
                fix="use humaneval, mbpp, or a set of that form",
            )
