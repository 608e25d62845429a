# SPDX-License-Identifier: Apache-2.0
"""Where things go in a figure: scales, round ticks, and labels that do not cover each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from values to positions; a reversed range turns the axis around."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """Return the position of `value`, kept inside the range."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.0, max(0.0, share)) * (self.stop - self.start)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers, evenly spaced, that enclose the interval from `low` to `high`.

    Args:
        low: Smallest value to show.
        high: Largest value to show; equal values are spread a little.
        count: Number of intervals to aim for.

    Returns:
        Ticks in rising order, the first at most `low` and the last at least `high`.
    """
    if not high > low:
        spread = abs(low) * 0.05 or 0.5
        low, high = low - spread, high + spread
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in _STEPS if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in user units; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Return whether the two share any area."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def inside(self, other: Box) -> bool:
        """Return whether this lies wholly in `other`."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True, slots=True)
class Placed:
    """A label's place: baseline start, and whether it is far enough from its mark to need a line to it."""

    x: float
    y: float
    box: Box
    far: bool


@dataclass
class LabelSpace:
    """Free space for labels inside `bounds`: each placed label and each mark takes its part."""

    bounds: Box
    taken: list[Box] = field(default_factory=list)

    def block(self, x: float, y: float, radius: float) -> None:
        """Keep labels away from a mark."""
        self.taken.append(Box(x - radius, y - radius, x + radius, y + radius))

    def block_boxes(self, boxes: Iterable[Box]) -> None:
        """Keep labels away from whole rectangles."""
        self.taken.extend(boxes)

    def place(
        self, x: float, y: float, text: str, *, size: float, gap: float, reach: Sequence[float] = (0.0,)
    ) -> Placed | None:
        """Find room for `text` beside the mark at (x, y), nearest first.

        Args:
            x: Centre of the mark.
            y: Centre of the mark.
            text: The label.
            size: Font size in user units.
            gap: Distance from the mark's centre to the label's edge.
            reach: Further distances to try, in order; beyond the first, the label is `far`.

        Returns:
            The place, now taken, or None when every candidate is occupied.
        """
        width, height = text_width(text, size), size * 1.1
        for extra in reach:
            for box in _around(x, y, width, height, gap + extra):
                if box.inside(self.bounds) and not any(box.overlaps(other) for other in self.taken):
                    self.taken.append(box)
                    return Placed(box.left, box.bottom - 0.28 * size, box, extra > reach[0])
        return None


def text_width(text: str, size: float) -> float:
    """Return a generous estimate of a text's width: no font is known before the page is opened."""
    return 0.62 * size * len(text)


def _around(x: float, y: float, width: float, height: float, gap: float) -> list[Box]:
    slant = gap * 0.72
    lefts_and_tops = [
        (x + gap, y - height / 2),
        (x - gap - width, y - height / 2),
        (x - width / 2, y - gap - height),
        (x - width / 2, y + gap),
        (x + slant, y - slant - height),
        (x + slant, y + slant),
        (x - slant - width, y - slant - height),
        (x - slant - width, y + slant),
    ]
    return [Box(left, top, left + width, top + height) for left, top in lefts_and_tops]
