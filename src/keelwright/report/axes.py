# SPDX-License-Identifier: Apache-2.0
"""Where things go in a figure: scales, round ticks, rectangles, and straight lines."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
        return self.anywhere(min(self.high, max(self.low, value)))

    def anywhere(self, value: float) -> float:
        """Return the position of `value`, outside the range too."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


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

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """Return the point of the rectangle that lies nearest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)

    def distance(self, x: float, y: float) -> float:
        """Return how far (x, y) is from the rectangle, 0 inside it."""
        return math.dist((x, y), self.nearest(x, y))


@dataclass(frozen=True, slots=True)
class Segment:
    """A straight line between two places."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def length(self) -> float:
        """Length in user units."""
        return math.dist((self.x1, self.y1), (self.x2, self.y2))

    @property
    def is_upright(self) -> bool:
        """Whether the line runs straight up or down."""
        return self.x1 == self.x2

    def within(self, box: Box) -> Segment | None:
        """Return the part of a level or upright line that lies in `box`, None where there is none."""
        if not (box.left <= self.x1 or box.left <= self.x2) or not (box.top <= self.y1 or box.top <= self.y2):
            return None
        if min(self.x1, self.x2) > box.right or min(self.y1, self.y2) > box.bottom:
            return None
        part = Segment(*box.nearest(self.x1, self.y1), *box.nearest(self.x2, self.y2))
        return part if part.length else None

    def distance(self, x: float, y: float) -> float:
        """Return how far (x, y) is from the line."""
        if self.length == 0.0:
            return math.dist((x, y), (self.x1, self.y1))
        run, rise = self.x2 - self.x1, self.y2 - self.y1
        share = ((x - self.x1) * run + (y - self.y1) * rise) / self.length**2
        share = min(1.0, max(0.0, share))
        return math.dist((x, y), (self.x1 + share * run, self.y1 + share * rise))

    def crosses(self, box: Box) -> bool:
        """Return whether any part of the line lies inside `box`."""
        low, high = 0.0, 1.0
        for start, run, near, far in (
            (self.x1, self.x2 - self.x1, box.left, box.right),
            (self.y1, self.y2 - self.y1, box.top, box.bottom),
        ):
            if run == 0.0:
                if not near < start < far:
                    return False
                continue
            ends = sorted(((near - start) / run, (far - start) / run))
            low, high = max(low, ends[0]), min(high, ends[1])
        return low < high

    def meets(self, other: Segment) -> bool:
        """Return whether the two lines cross."""
        return (
            _side(self, other.x1, other.y1) * _side(self, other.x2, other.y2) < 0
            and _side(other, self.x1, self.y1) * _side(other, self.x2, self.y2) < 0
        )


def _side(line: Segment, x: float, y: float) -> float:
    return (line.x2 - line.x1) * (y - line.y1) - (line.y2 - line.y1) * (x - line.x1)


def text_width(text: str, size: float) -> float:
    """Return a generous estimate of a text's width: no font is known before the page is opened."""
    return 0.62 * size * len(text)
