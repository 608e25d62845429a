# SPDX-License-Identifier: Apache-2.0
"""How far a judge can be trusted: sensitivity, specificity, kappa, and a rate corrected for the judge's errors.

Source:
    Cohen 1960; Rogan and Gladen 1978.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from keelwright.core.config import require_in_range
from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Estimate
from keelwright.ops.intervals import wilson

_LEAST_INFORMATION = 1.1
"""A judge whose sensitivity and specificity add up to no more than this is close to guessing."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """A yes-or-no judge against the truth."""

    tp: int
    fn: int
    fp: int
    tn: int

    @property
    def sensitivity(self) -> Estimate:
        """Share of true cases that the judge finds, with its Wilson interval."""
        return wilson(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> Estimate:
        """Share of other cases that the judge leaves alone, with its Wilson interval."""
        return wilson(self.tn, self.tn + self.fp)

    @property
    def kappa(self) -> float:
        """Cohen's kappa of judge and truth."""
        pairs = [(True, True)] * self.tp + [(True, False)] * self.fn + [(False, True)] * self.fp
        pairs += [(False, False)] * self.tn
        return cohen_kappa([truth for truth, _ in pairs], [said for _, said in pairs])


def confusion(truth: Sequence[bool], said: Sequence[bool]) -> Confusion:
    """Return the four counts of a judge's `said` against the `truth`.

    Raises:
        DataError: The two have different lengths.
    """
    _require_same_length(truth, said)
    counts = Counter(zip(truth, said, strict=True))
    return Confusion(
        tp=counts[(True, True)], fn=counts[(True, False)], fp=counts[(False, True)], tn=counts[(False, False)]
    )


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Return Cohen's unweighted kappa of two raters on the same items.

    Returns:
        1 for full agreement, 0 for the agreement of chance, below 0 for less. When both raters give every item the
        same single class, chance explains everything and 1.0 is returned.

    Raises:
        DataError: The two have different lengths or are empty.
    """
    _require_same_length(first, second)
    n = len(first)
    if n == 0:
        raise DataError("Agreement over no items is not defined.", expected="at least one item", found="none")
    agreed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    of_first, of_second = Counter(first), Counter(second)
    by_chance = sum(count * of_second[label] for label, count in of_first.items()) / (n * n)
    return 1.0 if by_chance == 1.0 else (agreed - by_chance) / (1.0 - by_chance)


def rogan_gladen(observed: float, *, sensitivity: float, specificity: float) -> float:
    """Return the true rate behind an observed one, given the judge's sensitivity and specificity.

    Returns:
        `(observed + specificity - 1) / (sensitivity + specificity - 1)`, clipped to 0..1.

    Raises:
        ConfigError: A rate is outside 0..1, or the judge is too close to guessing to be corrected for.
    """
    require_in_range("observed", observed, low=0.0, high=1.0)
    require_in_range("sensitivity", sensitivity, low=0.0, high=1.0)
    require_in_range("specificity", specificity, low=0.0, high=1.0)
    if sensitivity + specificity <= _LEAST_INFORMATION:
        raise ConfigError(
            "This judge is too close to guessing for its rates to be corrected.",
            expected=f"sensitivity + specificity above {_LEAST_INFORMATION}",
            found=f"{sensitivity:g} + {specificity:g}",
            fix="use a better judge; the correction would magnify noise",
        )
    corrected = (observed + specificity - 1.0) / (sensitivity + specificity - 1.0)
    return min(1.0, max(0.0, corrected))


def _require_same_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> None:
    if len(first) != len(second):
        raise DataError(
            "Two raters must have seen the same items.",
            expected=f"{len(first)} labels from each",
            found=f"{len(first)} and {len(second)}",
            fix="pair the labels by item first",
        )
