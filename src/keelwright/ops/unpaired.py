# SPDX-License-Identifier: Apache-2.0
"""Two shares on different items: Fisher's exact test, the pooled normal test, and the interval of the difference.

Where the items are the same, use `keelwright.ops.paired`: it sees changes that these cannot.

Source:
    Fisher 1935; Newcombe 1998 (interval from two Wilson intervals).
"""

from __future__ import annotations

import math
from statistics import NormalDist

from keelwright.core.config import require_choice
from keelwright.core.errors import ConfigError
from keelwright.core.records import Estimate
from keelwright.ops.intervals import wilson
from keelwright.ops.paired import Alternative

_TIE = 1.0 + 1e-12


def fisher_exact(a: int, b: int, c: int, d: int, *, alternative: Alternative = "two-sided") -> float:
    """Return Fisher's exact p-value of equal shares: `a` of `a + b` against `c` of `c + d`.

    Given the margins every table has a hypergeometric chance. The two-sided value adds up the tables that are no more
    likely than the one observed.

    Args:
        a, b: Events and others on the first side.
        c, d: Events and others on the second side.
        alternative: `greater` asks whether the second share is above the first.

    Raises:
        ConfigError: A count is negative, or the alternative unknown.
    """
    require_choice("alternative", alternative, ("two-sided", "greater", "less"))
    if min(a, b, c, d) < 0:
        raise ConfigError(
            "A count is negative.", expected="counts of 0 or more", found=f"{a}, {b}, {c}, {d}", fix="count again"
        )
    first, events, n = a + b, a + c, a + b + c + d
    lowest, highest = max(0, events - (c + d)), min(first, events)
    whole = _log_choose(n, events)
    chances = {
        x: math.exp(_log_choose(first, x) + _log_choose(n - first, events - x) - whole)
        for x in range(lowest, highest + 1)
    }
    if alternative == "greater":
        tail = sum(chance for x, chance in chances.items() if x <= a)
    elif alternative == "less":
        tail = sum(chance for x, chance in chances.items() if x >= a)
    else:
        # Lengthy sums of logarithms carry an error that grows with n; equally likely tables must count as ties.
        limit = chances[a] * (_TIE + n * 1e-13)
        tail = sum(chance for chance in chances.values() if chance <= limit)
    return min(1.0, tail)


def two_proportion_test(
    successes: int, n: int, other_successes: int, other_n: int, *, alternative: Alternative = "two-sided"
) -> float:
    """Return the p-value of equal shares on different items by the normal test, variance pooled.

    For large samples; `fisher_exact` holds its level for any.

    Args:
        successes, n: Events and items of the first side.
        other_successes, other_n: Events and items of the second side.
        alternative: `greater` asks whether the second share is above the first.

    Raises:
        ConfigError: The counts are impossible, or the alternative unknown.
    """
    require_choice("alternative", alternative, ("two-sided", "greater", "less"))
    first, second = wilson(successes, n).value, wilson(other_successes, other_n).value
    pooled = (successes + other_successes) / (n + other_n)
    spread = math.sqrt(pooled * (1.0 - pooled) * (1.0 / n + 1.0 / other_n))
    z = (second - first) / spread if spread > 0.0 else 0.0
    normal = NormalDist()
    tails = {"greater": normal.cdf(-z), "less": normal.cdf(z), "two-sided": 2.0 * normal.cdf(-abs(z))}
    return tails[alternative]


def unpaired_difference(
    successes: int, n: int, other_successes: int, other_n: int, *, confidence: float = 0.95
) -> Estimate:
    """Return the second share minus the first on different items, with Newcombe's interval.

    Args:
        successes, n: Events and items of the first side.
        other_successes, other_n: Events and items of the second side.
        confidence: Two-sided coverage, 0 to 1.

    Returns:
        The difference, -1 to 1; `n` counts the items of both sides.

    Raises:
        ConfigError: The counts are impossible or `confidence` is outside (0, 1).
    """
    first = wilson(successes, n, confidence=confidence)
    second = wilson(other_successes, other_n, confidence=confidence)
    value = second.value - first.value
    return Estimate(
        value=value,
        low=value - math.hypot(second.value - second.low, first.high - first.value),
        high=value + math.hypot(second.high - second.value, first.value - first.low),
        n=n + other_n,
    )


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
