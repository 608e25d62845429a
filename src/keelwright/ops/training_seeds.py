# SPDX-License-Identifier: Apache-2.0
"""Claims about a method, not about one model: the training seed is the unit.

Items tell how surely one model changed; they say nothing of what the next training run would give. With one figure per
seed and method, paired by seed, the differences are tested: by Student's t, or by flipping their signs, which assumes
less and cannot get below `2 / 2 ** seeds`.

Source:
    Student 1908; Fisher 1935 (sign flips).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import DataError, NumericalError
from keelwright.core.records import Estimate
from keelwright.ops.bootstrap import cluster_permutation
from keelwright.ops.intervals import student_cdf, student_quantile
from keelwright.ops.paired import Alternative
from keelwright.ops.resampling import Floats

FEWEST_SEEDS = 3


@dataclass(frozen=True, slots=True)
class SeedTest:
    """The outcome of a comparison over training seeds."""

    difference: Estimate
    """Mean of the second minus the first over seeds, with Student's interval; `n` counts seeds."""
    p_value: float
    test: str
    smallest_p: float
    """The smallest p-value that this test can give with so many seeds; 0 for Student's t."""


def seed_test(
    first: Sequence[float] | Floats,
    second: Sequence[float] | Floats,
    *,
    test: Literal["t", "permutation"] = "t",
    alternative: Alternative = "two-sided",
    confidence: float = 0.95,
) -> SeedTest:
    """Return the test of `second - first`, paired by training seed.

    Args:
        first, second: One figure per training seed, in the same order of seeds.
        test: `t` (Student, paired) or `permutation` (sign flips, exact up to 16 seeds).
        alternative: `greater` asks whether the second is above the first.
        confidence: Two-sided coverage of the interval, 0 to 1.

    Raises:
        DataError: There are fewer than three seeds, the two do not pair up, or all differences are one number other
            than zero, on which Student's t is not defined.
        NumericalError: A figure is NaN or infinite.
        ConfigError: A setting is unknown or out of range.
    """
    require_choice("test", test, ("t", "permutation"))
    require_choice("alternative", alternative, ("two-sided", "greater", "less"))
    require_in_range("confidence", confidence, low=0.0, high=1.0, low_open=True, high_open=True)
    change = _differences(first, second)
    n = len(change)
    mean, error = float(change.mean()), float(change.std(ddof=1)) / n**0.5
    half = student_quantile(0.5 + confidence / 2.0, n - 1) * error
    difference = Estimate(value=mean, low=mean - half, high=mean + half, n=n)
    if test == "permutation":
        p_value = cluster_permutation(change, range(n), alternative=alternative)
        smallest = (1 if alternative != "two-sided" else 2) / 2**n
        return SeedTest(difference, p_value, "sign flips by training seed", smallest)
    # A spread of rounding errors is none.
    if error <= 1e-12 * abs(mean):
        if mean == 0.0:
            return SeedTest(difference, 1.0, "paired t over training seeds", 0.0)
        raise DataError(
            "All seeds differ by the same amount, so Student's t is not defined.",
            expected="differences that vary",
            found=f"{n} times {mean:g}",
            fix="use test='permutation'",
        )
    above = 1.0 - student_cdf(mean / error, n - 1)
    below = student_cdf(mean / error, n - 1)
    tails = {"greater": above, "less": below, "two-sided": 2.0 * min(above, below)}
    return SeedTest(difference, min(1.0, tails[alternative]), "paired t over training seeds", 0.0)


def _differences(first: Sequence[float] | Floats, second: Sequence[float] | Floats) -> Floats:
    if len(first) != len(second) or len(first) < FEWEST_SEEDS:
        raise DataError(
            "A claim about a method needs the same training seeds on both sides.",
            expected=f"at least {FEWEST_SEEDS} figures each, paired by seed",
            found=f"{len(first)} and {len(second)}",
            fix="train with more seeds; items of one model do not replace them",
        )
    change = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    if not np.isfinite(change).all():
        raise NumericalError(
            "A seed's figure is NaN or infinite.",
            expected="one finite figure per seed",
            found=f"{int((~np.isfinite(change)).sum())} of {len(change)} differences are not",
            fix="report the seed as failed and leave it out on both sides",
        )
    return change
