# SPDX-License-Identifier: Apache-2.0
"""The exact judge of the picture world: the workshop's, on what words and picture say together."""

from __future__ import annotations

import dataclasses

from keelwright.core.errors import DataError
from keelwright.core.records import Generation, Item, Judgement
from keelwright.worlds.pictures.requests import find_pictured
from keelwright.worlds.workshop.judge import WorkshopJudge


class PicturesJudge:
    """Judges answers to requests with and without pictures, and to questions; meets `core.protocols.Judge`."""

    judge_id = "pictures-exact"

    def __init__(self, world: int = 0) -> None:
        """Judge by the tools of the given world."""
        self._workshop = WorkshopJudge(world)

    def judge(self, item: Item, generation: Generation) -> Judgement:
        """Return the answer's class, its score and the rule that decided.

        Raises:
            DataError: The item is neither a question with a known answer nor a request.
        """
        if item.kind == "task":
            return self._workshop.judge(item, generation)
        request = find_pictured(item.prompt)
        if request is None:
            raise DataError(
                f"Item '{item.item_id}' is no request to the workshop.",
                expected="a request in words, or one whose deed or thing is in its picture",
                found=item.prompt,
                fix="judge other prompts with another judge",
            )
        plain = dataclasses.replace(item, prompt=request.prompt("how do i"))
        return self._workshop.judge(plain, generation)
