# SPDX-License-Identifier: Apache-2.0
"""Finds room for the labels of a figure, so that none can be read as the name of a mark that is not its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from keelwright.report.axes import Box, Segment, text_width

_DIRECTIONS = 16
_CLEARLY = 0.8
"""A label is its mark's own when its gap to it is at most this share of its gap to any other mark."""
_LONG_GAP = 10.0
"""Farther than this from the edge of its mark, a label has a line to it in any case."""
_SHORT_LEADER = 7.0
"""A shorter line would not be seen between a mark and its label."""
_CROSSING_COST = 9.0
_LEADER_COST = 14.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A dot that labels may not cover, and that may have one of its own."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Placed:
    """A label's place: start of its baseline, the room it takes, and the line to its mark where it needs one."""

    x: float
    y: float
    box: Box
    leader: Segment | None


@dataclass
class LabelSpace:
    """Free space for labels inside `bounds`: each placed label takes its part."""

    bounds: Box
    marks: Sequence[Mark]
    walls: list[Box] = field(default_factory=list)
    """Rectangles that no label may cover, though a leader may."""
    lines: Sequence[Segment] = ()
    """What a label had better not cover."""
    texts: list[Box] = field(default_factory=list)
    leaders: list[Segment] = field(default_factory=list)

    def block(self, boxes: Iterable[Box]) -> None:
        """Keep labels off rectangles."""
        self.walls.extend(boxes)

    def place(
        self, mark: Mark, text: str, *, size: float, gap: float, reach: Sequence[float] = (0.0,)
    ) -> Placed | None:
        """Find the best room for `text` around its mark, and take it.

        Near beats far, free ground beats covered lines, and no line to the mark beats one.

        Args:
            mark: One of `marks`.
            text: The label.
            size: Font size in user units.
            gap: Distance from the edge of the mark to the label.
            reach: Further distances to try.

        Returns:
            The place, or None where any would cover something or be taken for another mark's label.
        """
        width, height = text_width(text, size), size * 1.1
        best: Placed | None = None
        least = math.inf
        for extra in reach:
            for turn, box in enumerate(_around(mark, width, height, gap + extra)):
                if not self._is_free(box):
                    continue
                leader = None if self.belongs(box, mark) else _leader(mark, box)
                if leader is not None and not self._is_clear(leader, mark):
                    continue
                cost = extra + 0.01 * turn + (0.0 if leader is None else _LEADER_COST)
                cost += _CROSSING_COST * sum(line.crosses(box) for line in self.lines)
                if cost < least:
                    best, least = Placed(box.left, box.bottom - 0.28 * size, box, leader), cost
        if best is not None:
            self.texts.append(best.box)
            self.leaders += [best.leader] if best.leader else []
        return best

    def belongs(self, box: Box, mark: Mark) -> bool:
        """Return whether a reader would take a label in `box` for the name of `mark` and of no other."""
        own = box.distance(mark.x, mark.y)
        if own - mark.radius > _LONG_GAP:
            return False
        for other in self.marks:
            away = box.distance(other.x, other.y)
            if other != mark and (own >= away or own - mark.radius > _CLEARLY * (away - other.radius)):
                return False
        return True

    def _is_free(self, box: Box) -> bool:
        if not box.inside(self.bounds) or any(box.overlaps(other) for other in (*self.texts, *self.walls)):
            return False
        if any(box.distance(mark.x, mark.y) < mark.radius for mark in self.marks):
            return False
        return not any(line.crosses(box) for line in self.leaders)

    def _is_clear(self, leader: Segment, mark: Mark) -> bool:
        """Return whether a leader points at its own mark only and runs through no text."""
        if leader.length < _SHORT_LEADER or any(leader.crosses(box) for box in self.texts):
            return False
        if any(leader.meets(other) for other in self.leaders):
            return False
        return all(leader.distance(other.x, other.y) > other.radius + 1 for other in self.marks if other != mark)


def _leader(mark: Mark, box: Box) -> Segment:
    """Return the line from the edge of the mark to the nearest point of the label."""
    x, y = box.nearest(mark.x, mark.y)
    share = mark.radius / max(mark.radius, math.dist((x, y), (mark.x, mark.y)))
    return Segment(mark.x + share * (x - mark.x), mark.y + share * (y - mark.y), x, y)


def _around(mark: Mark, width: float, height: float, gap: float) -> list[Box]:
    """Return rectangles around a mark: right, left, above and below first, then all around it."""
    reach = mark.radius + gap
    middle_x, middle_y = mark.x - width / 2, mark.y - height / 2
    starts = [
        (mark.x + reach, middle_y),
        (mark.x - reach - width, middle_y),
        (middle_x, mark.y - reach - height),
        (middle_x, mark.y + reach),
    ]
    for step in range(_DIRECTIONS):
        angle = 2 * math.pi * (step + 0.5) / _DIRECTIONS
        x, y = mark.x + reach * math.cos(angle), mark.y + reach * math.sin(angle)
        starts.append((x if x > mark.x else x - width, y if y > mark.y else y - height))
    return [Box(left, top, left + width, top + height) for left, top in starts]
