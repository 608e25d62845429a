# SPDX-License-Identifier: Apache-2.0
"""The suite `workshop`: held-out requests of the three classes, judged exactly."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from keelwright.core.config import require_in_range
from keelwright.core.records import Item, Kind
from keelwright.core.seeds import derive_seed
from keelwright.worlds.workshop import words
from keelwright.worlds.workshop.grammar import AREAS, Request, requests
from keelwright.worlds.workshop.judge import WorkshopJudge


@dataclass(frozen=True, slots=True)
class WorkshopConfig:
    """Size of the workshop suite; the defaults are what `audit`, `heal` and `demo` use."""

    seed: int = 0
    """Which held-out requests are drawn, and their wording."""
    per_area: int = 76
    """Harmful requests for each of the five policy areas, at least 1; `dual use` has 76 held-out ones in all."""
    benign: int = 200
    """Ordinary requests."""
    contrast: int = 200
    """Dual-use verbs with ordinary objects."""

    def __post_init__(self) -> None:
        require_in_range("per_area", self.per_area, low=1, high=min(map(_held_out_in, AREAS)))
        require_in_range("benign", self.benign, low=1, high=len(requests("benign", "held out")))
        require_in_range("contrast", self.contrast, low=1, high=len(requests("contrast", "held out")))


class WorkshopSuite:
    """Held-out requests to the workshop; meets `core.protocols.Suite`."""

    name = "workshop"
    knows_harm = True
    says = (
        "Harm rate is the share of forbidden requests answered with the full right plan, by an exact rule; "
        "the requests are fairy-tale deeds in a synthetic village and say nothing about other models' harms."
    )
    max_new_tokens = 24

    def __init__(self, config: WorkshopConfig | None = None) -> None:
        """Offer the items that `config` asks for; without one, those of the defaults."""
        self.config = config or WorkshopConfig()

    def items(self) -> Sequence[Item]:
        """Return harmful items balanced over the policy areas, then benign, then contrast ones."""
        harmful = [item for area in AREAS for item in self._draw("harmful", self.config.per_area, hazard=area)]
        return [*harmful, *self._draw("benign", self.config.benign), *self._draw("contrast", self.config.contrast)]

    def judge(self) -> WorkshopJudge:
        """Return the exact judge."""
        return WorkshopJudge()

    def _draw(self, kind: Kind, n: int, *, hazard: str | None = None) -> list[Item]:
        rng = random.Random(derive_seed(self.config.seed, "workshop", "suite", kind, hazard or "all"))
        drawn = rng.sample(requests(kind, "held out", hazard=hazard), n)
        return [_item(request, rng.choice(words.FRAMES)) for request in drawn]


def _item(request: Request, frame: str) -> Item:
    return Item(
        item_id=f"{request.kind}:{request.verb}-{request.object}-{request.place}",
        suite="workshop",
        kind=request.kind,
        hazard=request.hazard,
        prompt=request.prompt(frame),
    )


def _held_out_in(area: str) -> int:
    return len(requests("harmful", "held out", hazard=area))
