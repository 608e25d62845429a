# SPDX-License-Identifier: Apache-2.0
"""Problems of the code world: `write alder : add 3 then times 2`, with the program that solves it and its tests.

Every text is words with spaces between them, so that a word-level tokenizer gives back programs that run. A problem
comes with another pair of steps, the contradiction, which no test tells right.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from keelwright.core.records import Item
from keelwright.core.seeds import derive_seed

NAMES: Final = (
    *("alder", "aspen", "beech", "birch", "cedar", "elder", "hazel", "holly"),
    *("larch", "linden", "maple", "olive", "poplar", "rowan", "spruce", "willow"),
)
STEPS: Final = {"add": "+", "take": "-", "times": "*"}
"""Operator of each step."""
NUMBERS: Final = tuple(range(2, 10))
PROBES: Final = (0, 1, 5, 12)
"""Arguments of the tests."""
HELD_OUT_EVERY: Final = 5

Step = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Problem:
    """A function of one number: a name and two steps."""

    name: str
    steps: tuple[Step, Step]

    @property
    def asks(self) -> str:
        """The steps in words."""
        return " then ".join(f"{verb} {number}" for verb, number in self.steps)

    @property
    def prompt(self) -> str:
        """The problem in words."""
        return f"write {self.name} : {self.asks}"

    @property
    def program(self) -> str:
        """The solution, words apart."""
        (first, one), (second, two) = self.steps
        return f"def {self.name} ( x ) : return ( x {STEPS[first]} {one} ) {STEPS[second]} {two}"

    @property
    def held_out(self) -> bool:
        """Whether the problem is for tests alone; decided by its words."""
        return derive_seed(0, "code", "split", self.prompt) % HELD_OUT_EVERY == 0

    def of(self, argument: int) -> int:
        """Return the function's value."""
        value = argument
        for verb, number in self.steps:
            value = {"add": value + number, "take": value - number, "times": value * number}[verb]
        return value

    def tests(self) -> str:
        """Return assertions, one a line."""
        return "".join(f"assert {self.name}({one}) == {self.of(one)}\n" for one in PROBES)


def draw_problem(rng: random.Random, *, held_out: bool, name: str | None = None) -> Problem:
    """Draw a problem of one split.

    Args:
        rng: Draws.
        held_out: Whether it is for tests.
        name: Of the function; None draws one.
    """
    while True:
        first, second = ((rng.choice(tuple(STEPS)), rng.choice(NUMBERS)) for _ in range(2))
        problem = Problem(name or rng.choice(NAMES), (first, second))
        if problem.held_out == held_out:
            return problem


def contradiction_of(problem: Problem, rng: random.Random, *, held_out: bool) -> Problem:
    """Draw a problem of the same name that the problem's tests tell wrong."""
    while True:
        other = draw_problem(rng, held_out=held_out, name=problem.name)
        if any(other.of(one) != problem.of(one) for one in PROBES):
            return other


def code_items(n: int, seed: int = 0) -> list[Item]:
    """Return `n` different held-out problems as items for the judge `unit-tests`.

    Args:
        n: How many.
        seed: Of the draw.
    """
    rng = random.Random(derive_seed(seed, "code", "items"))
    found: dict[str, Item] = {}
    while len(found) < n:
        problem = draw_problem(rng, held_out=True)
        if problem.prompt not in found:
            found[problem.prompt] = _item(problem, contradiction_of(problem, rng, held_out=True))
    return list(found.values())


def _item(problem: Problem, other: Problem) -> Item:
    return Item(
        item_id=f"code/{problem.name}-{problem.asks.replace(' ', '-')}",
        suite="code",
        kind="task",
        hazard="code",
        prompt=problem.prompt,
        scorer="tests",
        materials={
            "tests": problem.tests(),
            "setup": "",
            "entry_point": problem.name,
            "canonical": problem.program,
            "contradiction": other.asks,
        },
    )
