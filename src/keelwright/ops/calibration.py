# SPDX-License-Identifier: Apache-2.0
"""Whether a judge's score is the chance it looks like: reliability table, expected calibration error, Brier score.

Equations (n items, bin B with n_B items, s the score, y the truth as 0 or 1):
    expected calibration error   sum_B n_B / n * |mean_B(y) - mean_B(s)|
    Brier score                  mean (s - y)^2

Limits: the expected calibration error depends on the bins and is above zero for a calibrated judge too, the more the
fewer items a bin has. Fix thresholds on the validation split only.

Source:
    Brier 1950; Naeini, Cooper and Hauskrecht 2015 (expected calibration error).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import DataError
from keelwright.core.records import Estimate
from keelwright.ops.intervals import wilson
from keelwright.ops.resampling import Floats

Binning = Literal["width", "count"]


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The items whose scores fall into one bin."""

    low: float
    """Lowest score of the bin: its edge for equal widths, the lowest score in it for equal counts."""
    high: float
    """Highest score of the bin, likewise."""
    mean_score: float
    share: Estimate
    """Share of the bin's items that are true, with its Wilson interval; `share.n` is their number."""

    @property
    def fits(self) -> bool:
        """Whether the mean score lies within the interval of the true share."""
        return self.share.low <= self.mean_score <= self.share.high


def reliability_table(
    scores: Sequence[float] | Floats,
    truth: Sequence[bool],
    *,
    bins: int = 10,
    binning: Binning = "width",
    confidence: float = 0.95,
) -> list[ReliabilityBin]:
    """Return, bin by bin from low to high, the mean score beside the true share.

    Args:
        scores: A judge's score per item, 0 to 1: how sure it is of the event.
        truth: Whether the event is there, by item.
        bins: Number of bins, at least 1.
        binning: `width` cuts 0..1 evenly; `count` gives every bin about as many items, equal scores kept together.
        confidence: Two-sided coverage of each share's interval.

    Returns:
        The bins that hold an item; with `count` there may be fewer than asked for, where scores repeat.

    Raises:
        DataError: The two do not pair up, are empty, or a score is outside 0..1.
        ConfigError: A setting is out of range.
    """
    require_choice("binning", binning, ("width", "count"))
    require_in_range("bins", float(bins), low=1.0)
    found, events = _checked(scores, truth)
    if binning == "width":
        numbers = np.minimum((found * bins).astype(np.int64), bins - 1)
    else:
        # The number of lower scores places equal scores in one bin.
        lower = np.searchsorted(np.sort(found), found, side="left")
        numbers = (lower * bins) // len(found)
    table = []
    for number in np.unique(numbers):
        inside = numbers == number
        own = found[inside]
        low, high = (number / bins, (number + 1) / bins) if binning == "width" else (own.min(), own.max())
        table.append(
            ReliabilityBin(
                low=float(low),
                high=float(high),
                mean_score=float(own.mean()),
                share=wilson(int(events[inside].sum()), len(own), confidence=confidence),
            )
        )
    return table


def expected_calibration_error(table: Sequence[ReliabilityBin]) -> float:
    """Return the mean distance of score and true share over the bins, weighted by their items; 0 is best.

    Raises:
        DataError: The table is empty.
    """
    n = sum(one.share.n for one in table)
    if n == 0:
        raise DataError("A table without bins has no error.", expected="at least one bin", found="none")
    return sum(one.share.n * abs(one.share.value - one.mean_score) for one in table) / n


def brier_score(scores: Sequence[float] | Floats, truth: Sequence[bool]) -> float:
    """Return the mean squared distance of score and truth: 0 is best, 0.25 is what a constant score of one half gets.

    Raises:
        DataError: The two do not pair up, are empty, or a score is outside 0..1.
    """
    found, events = _checked(scores, truth)
    return float(np.square(found - events).mean())


def _checked(scores: Sequence[float] | Floats, truth: Sequence[bool]) -> tuple[Floats, Floats]:
    found, events = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if len(found) != len(events) or len(found) == 0:
        raise DataError(
            "Scores and truth do not pair up.",
            expected="as many scores as labels, at least one",
            found=f"{len(found)} scores, {len(events)} labels",
            fix="pair them by item first",
        )
    outside = int((~((found >= 0.0) & (found <= 1.0))).sum())
    if outside:
        raise DataError(
            "A score is no probability.",
            expected="scores from 0 to 1",
            found=f"{outside} of {len(found)} outside",
            fix="rescale the judge's scores first",
        )
    return found, events
