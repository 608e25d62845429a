# SPDX-License-Identifier: Apache-2.0
"""Intervals for one proportion: Wilson to show, Clopper-Pearson to decide, the bound after zero events; Student's t.

Everything runs in float64 on plain numbers. The binomial tails come from the incomplete beta function, so a bound
costs the same for ten items as for a million.

Source:
    Wilson 1927; Clopper and Pearson 1934.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

from keelwright.core.config import require_in_range
from keelwright.core.errors import ConfigError
from keelwright.core.records import Estimate

_STANDARD_NORMAL = NormalDist()
_TINY = 1e-300
_PRECISION = 1e-15
_MOST_TERMS = 100_000
_WIDEST_T = 1e12


def normal_quantile(share: float) -> float:
    """Return the standard normal quantile of `share`, 0 < share < 1."""
    require_in_range("share", share, low=0.0, high=1.0, low_open=True, high_open=True)
    return _STANDARD_NORMAL.inv_cdf(share)


def two_sided_z(confidence: float) -> float:
    """Return the half-width, in standard errors, of a two-sided normal interval: 1.96 for 0.95."""
    require_in_range("confidence", confidence, low=0.0, high=1.0, low_open=True, high_open=True)
    return normal_quantile(0.5 + confidence / 2.0)


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """Return the share `successes / n` with its Wilson score interval.

    Args:
        successes: Number of events, 0 to `n`.
        n: Number of items, at least 1.
        confidence: Two-sided coverage, 0 to 1.

    Raises:
        ConfigError: The counts are impossible or `confidence` is outside (0, 1).
    """
    _require_counts(successes, n)
    z = two_sided_z(confidence)
    share = successes / n
    scale = 1.0 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1.0 - share) / n + z * z / (4 * n * n))
    # The ends at 0 and at n are exact by algebra; floating point leaves a residue of 1e-17 there.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Estimate(value=share, low=low, high=high, n=n)


def clopper_pearson(successes: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """Return the share `successes / n` with its exact (conservative) Clopper-Pearson interval.

    Args:
        successes: Number of events, 0 to `n`.
        n: Number of items, at least 1.
        confidence: Two-sided coverage that is never undercut, 0 to 1.

    Raises:
        ConfigError: The counts are impossible or `confidence` is outside (0, 1).
    """
    _require_counts(successes, n)
    require_in_range("confidence", confidence, low=0.0, high=1.0, low_open=True, high_open=True)
    tail = (1.0 - confidence) / 2.0
    low = 0.0 if successes == 0 else _solve_probability(lambda p: binomial_at_least(successes, n, p), tail)
    high = 1.0 if successes == n else _solve_probability(lambda p: binomial_at_least(successes + 1, n, p), 1.0 - tail)
    return Estimate(value=successes / n, low=low, high=high, n=n)


def zero_events_upper(n: int, *, confidence: float = 0.95) -> float:
    """Return the one-sided upper bound of a rate after no event in `n` items: `1 - alpha ** (1 / n)`, about 3 / n."""
    _require_counts(0, n)
    require_in_range("confidence", confidence, low=0.0, high=1.0, low_open=True, high_open=True)
    return -math.expm1(math.log1p(-confidence) / n)


def binomial_at_least(k: int, n: int, p: float) -> float:
    """Return P(X >= k) for X binomial with `n` trials of probability `p`.

    Args:
        k: Threshold; at or below 0 the answer is 1, above `n` it is 0.
        n: Number of trials, at least 1.
        p: Probability of one success, 0 to 1.
    """
    require_in_range("p", p, low=0.0, high=1.0)
    if k <= 0:
        return 1.0
    if k > n:
        return 0.0
    return incomplete_beta(float(k), float(n - k + 1), p)


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b), for a, b > 0 and x in [0, 1], in float64."""
    if x in (0.0, 1.0):
        return x
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log_front)
    # The continued fraction converges fast only left of the mean; the mirror image serves the other side.
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, 1.0 - x) / b


def student_cdf(t: float, freedom: int) -> float:
    """Return P(T <= t) for Student's t with `freedom` degrees of freedom."""
    tail = 0.5 * incomplete_beta(freedom / 2.0, 0.5, freedom / (freedom + t * t))
    return tail if t < 0.0 else 1.0 - tail


def student_quantile(share: float, freedom: int) -> float:
    """Return the quantile of Student's t at `share`, 0.5 <= share < 1."""
    require_in_range("share", share, low=0.5, high=1.0, high_open=True)
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < share and high < _WIDEST_T:
        high *= 2.0
    while True:
        middle = (low + high) / 2.0
        if middle in (low, high):
            return middle
        if student_cdf(middle, freedom) < share:
            low = middle
        else:
            high = middle


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Return the continued fraction of the incomplete beta function, evaluated from the front (Lentz's scheme)."""
    numerator = 1.0
    first = 1.0 - (a + b) * x / (a + 1.0)
    denominator = 1.0 / (first if abs(first) > _TINY else _TINY)
    fraction = denominator
    for m in range(1, _MOST_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            below, above = 1.0 + term * denominator, 1.0 + term / numerator
            denominator = 1.0 / (below if abs(below) > _TINY else _TINY)
            numerator = above if abs(above) > _TINY else _TINY
            step = numerator * denominator
            fraction *= step
        if abs(step - 1.0) < _PRECISION:
            break
    return fraction


def _solve_probability(rising: Callable[[float], float], target: float) -> float:
    """Return p in [0, 1] where the function `rising`, which grows with p, reaches `target`."""
    low, high = 0.0, 1.0
    while True:
        middle = (low + high) / 2.0
        if middle in (low, high):
            return middle
        if rising(middle) < target:
            low = middle
        else:
            high = middle


def _require_counts(successes: int, n: int) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise ConfigError(
            "A share needs at least one item and no more events than items.",
            expected="n >= 1 and 0 <= successes <= n",
            found=f"successes={successes}, n={n}",
            fix="check what was counted; a rate over nothing is 'not measured'",
        )
