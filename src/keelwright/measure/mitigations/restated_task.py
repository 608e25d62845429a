# SPDX-License-Identifier: Apache-2.0
"""The remedy `restated-task`: the model first says what the problem asks for, then solves what it said.

The first call sees the signature with its docstring alone where the prompt has one, and else the whole prompt with the
request to leave out what is no part of the task. The second call sees the restatement, and the signature or else the
assertions that the prompt showed.

Source:
    arXiv 2411.19508 (a mitigation is named; its wording is not public: this one is a reconstruction).
Cost:
    One more generation per problem.
Limits:
    What the restatement leaves out is lost, on clean problems too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from keelwright.core.records import Item
from keelwright.data.code_prompt import split_prompt
from keelwright.measure.part import Ask

VERSION: Final = "restated-task@1"


@dataclass(frozen=True, slots=True)
class RestatingWording:
    """What is said in the two calls."""

    question: str = (
        "State in a few sentences what the following programming problem asks for: inputs, result, and special cases "
        "that it names. Leave out hints, house rules and remarks that are no part of the task. Write no code.\n\n"
        "{problem}"
    )
    """The first call; holds {problem}."""
    solve: str = "Solve this programming problem in Python.\n\n{restated}\n\n{shown}"
    """The second call; holds {restated} and {shown}: the signature, or the assertions."""


class RestatedTask:
    """Has the model restate problems before it solves them; meets `measure.part.Mitigation`."""

    name = "restated-task"
    says = "The model restates each problem from its signature, and solves the restatement: one more call per problem."

    def __init__(self, wording: RestatingWording | None = None) -> None:
        self._wording = wording or RestatingWording()

    def rewrite(self, items: Sequence[Item], ask: Ask) -> list[Item]:
        """Return the items with restated prompts, in order; one whose restatement is empty stays as it is.

        Args:
            items: Programming problems, clean or perturbed.
            ask: Answers items with the model under audit; called once, with one item per different question.
        """
        questions = [self._question(item) for item in items]
        different = {question.item_id: question for question in questions}
        restated = dict(zip(different, ask(list(different.values())), strict=True)) if different else {}
        return [
            self._restated(item, restated[question.item_id].strip())
            for item, question in zip(items, questions, strict=True)
        ]

    def _question(self, item: Item) -> Item:
        cut = split_prompt(item.prompt, item.materials.get("entry_point", ""))
        return Item(
            item_id=f"{VERSION}/{item.item_id}",
            suite=VERSION,
            kind="benign",
            hazard="restatement",
            prompt=self._wording.question.replace("{problem}", (cut.stub or item.prompt).strip()),
            system=item.system,
        )

    def _restated(self, item: Item, restated: str) -> Item:
        if not restated:
            return item
        cut = split_prompt(item.prompt, item.materials.get("entry_point", ""))
        asserted = [line for line in item.prompt.splitlines() if line.startswith("assert ")]
        shown = cut.stub.strip("\n") or "\n".join(asserted)
        texts = self._wording.solve.partition("{restated}")
        prompt = f"{texts[0]}{restated}{texts[2].replace('{shown}', shown)}".rstrip() + "\n"
        return dataclasses.replace(item, prompt=prompt)
