# SPDX-License-Identifier: Apache-2.0
"""The builder `code-robustness`: every problem clean and perturbed, and what could not be perturbed is told."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Item
from keelwright.data.perturb.perturbation import read_perturbations
from keelwright.data.sets.catalogue import load_set
from keelwright.measure.builders.code_robustness import build
from keelwright.measure.part import Drawn, PartSpec

DATA = os.environ.get("KEELWRIGHT_DATA")


@dataclass(frozen=True)
class Shelf:
    """A set that was read."""

    items: Sequence[Item]
    name: str = "sums"
    digest: str = "d0"
    licence: str = "MIT"
    caution: str = "Small."


def _problem(index: int) -> Item:
    prompt = (
        f'def add{index}(a, b):\n    """Return the sum of two numbers.\n\n    >>> add{index}(1, 2)\n    3\n    """\n'
    )
    return Item(
        f"sums/{index}",
        "sums",
        "task",
        "code",
        prompt,
        scorer="tests",
        materials={
            "tests": f"assert add{index}(2, 3) == 5\n",
            "entry_point": f"add{index}",
            "canonical": f"{prompt}    return a + b\n",
            "setup": "",
        },
    )


PROBLEMS = [_problem(index) for index in range(6)]


def _build(items: Sequence[Item] = PROBLEMS, *, limit: int | None = None, seed: int = 0, **settings: Any) -> Drawn:
    spec = PartSpec(sets=("sums",), builder="code-robustness", name="c", settings={"code-robustness": settings})
    return build(spec, lambda _: Shelf(items), limit=limit, seed=seed)


def test_each_problem_comes_clean_and_once_per_perturbation() -> None:
    drawn = _build()
    clean = [item for item in drawn.items if "perturbation" not in item.facts]
    assert clean == PROBLEMS
    attacked = [item for item in drawn.items if "perturbation" in item.facts]
    assert {item.pair_id for item in attacked} == {item.item_id for item in clean}
    names = {one.name for one in read_perturbations().perturbations}
    assert {item.facts["perturbation"] for item in attacked} <= names
    assert all(item.materials == PROBLEMS[0].materials for item in attacked if item.pair_id == "sums/0")
    assert drawn.sets[0].n == len(drawn.items)


def test_a_limit_counts_problems_and_changes_nothing_else() -> None:
    whole, some = _build(), _build(limit=2)
    assert len([item for item in some.items if "perturbation" not in item.facts]) == 2
    prompts = {item.item_id: item.prompt for item in whole.items}
    assert all(prompts[item.item_id] == item.prompt for item in some.items)


def test_families_can_be_chosen_and_unknown_ones_are_refused() -> None:
    drawn = _build(families=["degrade_request"])
    assert {item.facts.get("family") for item in drawn.items} == {None, "degrade_request"}
    with pytest.raises(ConfigError) as caught:
        _build(families=["degrade_requests"])
    assert "did you mean 'degrade_request'?" in str(caught.value)
    with pytest.raises(ConfigError, match="'placement' is not a known choice"):
        _build(placement="system")


def test_other_wording_or_another_seed_is_another_set() -> None:
    digests = [
        drawn.sets[0].digest
        for drawn in (
            _build(),
            _build(limit=1),
            _build(seed=1),
            _build(placement="comment"),
            _build(families=["natural_noise"]),
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_what_a_problem_cannot_have_is_told_beside_the_set() -> None:
    bare = Item(
        "sums/x", "sums", "task", "code", "Write a program.", scorer="tests", materials={"tests": "assert True\n"}
    )
    said = _build([bare]).sets[0].caution
    assert said.startswith("Small. Problems without what a perturbation needs: ")
    assert "ignore_last_argument on 1" in said


@pytest.mark.parametrize(
    ("item", "found"),
    [
        (Item("sums/a", "sums", "harmful", "h", "p"), "'sums/a' of kind harmful"),
        (Item("sums/a", "sums", "task", "h", "p"), "'sums/a' of kind task without tests"),
    ],
)
def test_a_set_without_programming_problems_is_refused(item: Item, found: str) -> None:
    with pytest.raises(DataError) as caught:
        _build([item])
    assert "The set 'sums' holds no programming problems." in str(caught.value)
    assert found in str(caught.value)


@pytest.mark.skipif(DATA is None, reason="KEELWRIGHT_DATA does not name the shared data sets")
def test_the_published_problems_are_perturbed() -> None:
    spec = PartSpec(sets=("humaneval", "mbpp"), builder="code-robustness", name="c")
    drawn = build(spec, lambda name: load_set(name, offline=True), limit=5, seed=0)
    assert len({item.item_id for item in drawn.items}) == len(drawn.items)
    assert {item.facts.get("semantics") for item in drawn.items} == {None, "preserved", "contradicted"}
