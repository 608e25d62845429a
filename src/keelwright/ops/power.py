# SPDX-License-Identifier: Apache-2.0
"""The power of the exact McNemar test, counted and not approximated.

Equation: of `n` pairs `M ~ Bin(n, psi)` are discordant, and of those `X ~ Bin(M, (1 + d / psi) / 2)` go the way of the
net change d. The test rejects when X reaches the critical value of M; the power is the chance of that. The normal
formula promises a little more than the exact test gives, because the exact test is conservative.

Cost: milliseconds; one pass over the critical values up to the largest likely M, kept for later calls.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from keelwright.core.config import require_in_range
from keelwright.ops.resampling import Floats

_REACH = 8.0
"""Standard deviations of M that are summed over."""
_PRECISION = 1e-13
_MOST_TERMS = 10_000


def mcnemar_power(
    n: int, discordant_share: float, change: float, *, alpha: float = 0.05, two_sided: bool = True
) -> float:
    """Return the chance that the exact McNemar test rejects at `alpha`.

    Args:
        n: Pairs, at least 1.
        discordant_share: Share of pairs that change either way.
        change: Net change in size, 0 to `discordant_share`; 0 gives the level that the test really has.
        alpha: Level of the test.
        two_sided: Whether the test looks for either direction.

    Raises:
        ConfigError: A share is out of range.
    """
    require_in_range("n", float(n), low=1.0)
    require_in_range("discordant_share", discordant_share, low=0.0, high=1.0)
    require_in_range("change", change, low=0.0, high=discordant_share)
    require_in_range("alpha", alpha, low=0.0, high=0.5, low_open=True)
    if discordant_share == 0.0:
        return 0.0
    counts, chances = _likely_counts(n, discordant_share)
    critical = _critical_values(alpha / 2.0 if two_sided else alpha, _rounded_up(int(counts[-1])))[counts]
    share = min(1.0, (1.0 + change / discordant_share) / 2.0)
    power = float(chances @ binomial_tails(critical, counts, share))
    if two_sided:
        power += float(chances @ binomial_tails(critical, counts, 1.0 - share))
    return min(1.0, power)


def binomial_tails(k: NDArray[np.int64], n: NDArray[np.int64], p: float) -> Floats:
    """Return P(X >= k) for binomial X with `n` trials of probability `p`, for many `k` and `n` at once.

    Args:
        k: Thresholds; at or below 0 the answer is 1, above `n` it is 0. Shape `[m]`.
        n: Numbers of trials. Shape `[m]`.
        p: Probability of one success, 0 to 1.

    Returns:
        Shape `[m]`, float64.
    """
    found = np.where(k <= 0, 1.0, 0.0)
    inside = (k > 0) & (k <= n)
    if p == 1.0:
        found[inside] = 1.0
    elif p > 0.0 and inside.any():
        found[inside] = _incomplete_beta(k[inside].astype(np.float64), (n - k + 1)[inside].astype(np.float64), p)
    return found


def _incomplete_beta(a: Floats, b: Floats, x: float) -> Floats:
    """Return I_x(a, b) by the continued fraction, on the side of the mean where it converges fast."""
    mirrored = x >= (a + 1.0) / (a + b + 2.0)
    first, second = np.where(mirrored, b, a), np.where(mirrored, a, b)
    left = np.where(mirrored, 1.0 - x, x)
    gammas = np.array(
        [math.lgamma(u + v) - math.lgamma(u) - math.lgamma(v) for u, v in zip(first, second, strict=True)]
    )
    front = np.exp(first * np.log(left) + second * np.log1p(-left) + gammas)
    found = front * _fraction(first, second, left) / first
    return np.asarray(np.where(mirrored, 1.0 - found, found), dtype=np.float64)


def _fraction(a: Floats, b: Floats, x: Floats) -> Floats:
    """Return the continued fraction of the incomplete beta function (Lentz's scheme), many at once."""
    numerator = np.ones_like(a)
    denominator = 1.0 / (1.0 - (a + b) * x / (a + 1.0))
    fraction = denominator
    for m in range(1, _MOST_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            denominator = 1.0 / (1.0 + term * denominator)
            numerator = 1.0 + term / numerator
            step = numerator * denominator
            fraction = fraction * step
        if float(np.abs(step - 1.0).max()) < _PRECISION:
            break
    return fraction


def _likely_counts(n: int, share: float) -> tuple[NDArray[np.int64], Floats]:
    """Return the numbers of discordant pairs that matter, and the chance of each."""
    reach = _REACH * math.sqrt(n * share * (1.0 - share)) + _REACH
    counts = np.arange(max(0, math.floor(n * share - reach)), min(n, math.ceil(n * share + reach)) + 1)
    if share == 1.0:
        return counts, (counts == n).astype(np.float64)
    whole, odds = math.lgamma(n + 1), (math.log(share), math.log1p(-share))
    logs = [
        whole - math.lgamma(m + 1) - math.lgamma(n - m + 1) + m * odds[0] + (n - m) * odds[1] for m in counts.tolist()
    ]
    return counts, np.exp(np.array(logs, dtype=np.float64))


@functools.lru_cache(maxsize=32)
def _critical_values(alpha: float, most: int) -> NDArray[np.int64]:
    """Return, for 0 to `most` fair coins, the fewest heads whose chance of being reached is at most `alpha`."""
    critical = np.empty(most + 1, dtype=np.int64)
    # `edge` is the chance of one head fewer than the critical number, `tail` that of the critical number or more.
    number, tail, edge = 1, 0.0, 1.0
    critical[0] = 1
    for coins in range(1, most + 1):
        tail += 0.5 * edge
        edge *= 0.5 * coins / (coins + 1 - number)
        if tail > alpha:
            edge *= (coins + 1 - number) / number
            tail -= edge
            number += 1
        critical[coins] = number
    return critical


def _rounded_up(count: int) -> int:
    return 1 << max(6, count.bit_length())
