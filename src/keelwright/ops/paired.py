# SPDX-License-Identifier: Apache-2.0
"""Before and after on the same items: the exact test, the interval of the change, many tests, enough items.

In every function `b` counts the pairs that gained the event (no before, yes after) and `c` those that lost it, so the
paired change after minus before is `(b - c) / n`.

Source:
    McNemar 1947 (exact form: sign test on discordant pairs); Tango 1998 (interval, and test against a margin); Holm
    1979; Benjamini and Hochberg 1995.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import ConfigError
from keelwright.core.records import Estimate
from keelwright.ops.intervals import normal_quantile, two_sided_z
from keelwright.ops.power import mcnemar_power

Alternative = Literal["two-sided", "greater", "less"]
"""What is tested: any change, a gain of events (b > c), or a loss (b < c)."""

_BISECTIONS = 200
_MOST_COUNTED = 20_000
"""Discordant pairs up to which power is counted; beyond, the exact test and the normal formula agree."""
_CLOSE = 1e-5


def mcnemar_exact(b: int, c: int, *, alternative: Alternative = "two-sided", mid_p: bool = False) -> float:
    """Return the exact McNemar p-value of `b` gains against `c` losses.

    Under no change each discordant pair falls either way with probability one half. The tail is summed in whole
    numbers, so no rounding enters before the final division.

    Args:
        b: Pairs with the event only after, at least 0.
        c: Pairs with the event only before, at least 0.
        alternative: `greater` asks whether events were gained, `less` whether they were lost.
        mid_p: Count the observed table by half: less conservative, no longer guaranteed to hold its level.

    Raises:
        ConfigError: A count is negative or the alternative unknown.
    """
    _require_pairs(b, c, b + c)
    require_choice("alternative", alternative, ("two-sided", "greater", "less"))
    n = b + c
    fewer = min(b, c) if alternative == "two-sided" else (c if alternative == "greater" else b)
    # P(X <= fewer), X ~ Bin(n, 1/2): by symmetry also P(X >= n - fewer).
    term, tail = 1, 1
    for i in range(fewer):
        term = term * (n - i) // (i + 1)
        tail += term
    scale = 1 << (n + 1)
    sides = 2 if alternative == "two-sided" else 1
    doubled = sides * (2 * tail - (term if mid_p else 0))
    return min(doubled, scale) / scale


def paired_difference(b: int, c: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """Return the paired change `(b - c) / n` with Tango's score interval.

    Args:
        b: Pairs with the event only after.
        c: Pairs with the event only before.
        n: All pairs, discordant or not, at least 1.
        confidence: Two-sided coverage, 0 to 1.

    Returns:
        The change, -1 to 1; the interval is not of zero width even when nothing changed.

    Raises:
        ConfigError: The counts are impossible or `confidence` is outside (0, 1).
    """
    _require_pairs(b, c, n)
    z = two_sided_z(confidence)
    value = (b - c) / n
    low = _score_end(b, c, n, z, inside=value, outside=-1.0)
    high = _score_end(b, c, n, -z, inside=value, outside=1.0)
    return Estimate(value=value, low=low, high=high, n=n)


@dataclass(frozen=True, slots=True)
class NonInferiority:
    """Whether a paired change is shown to stay within a margin: the only ground for saying "no worse"."""

    difference: Estimate
    """The change with its interval of `1 - 2 alpha`: each end is a one-sided limit at `alpha`."""
    margin: float
    p_value: float
    """Of a change as bad as the margin or worse, by Tango's score."""
    holds: bool
    """Whether the one-sided limit stays within the margin."""

    @property
    def limit(self) -> float:
        """The end of the interval that is held against the margin."""
        return self.difference.low if self.margin < 0.0 else self.difference.high


def non_inferiority(b: int, c: int, n: int, *, margin: float, alpha: float = 0.05) -> NonInferiority:
    """Return whether the paired change is shown to be better than a margin.

    Args:
        b: Pairs with the event only after.
        c: Pairs with the event only before.
        n: All pairs, at least 1.
        margin: The change that would matter, in rate. Above 0 where more events are worse (harm rate: the change must
            stay below it), below 0 where fewer are (accuracy: it must stay above).
        alpha: One-sided level.

    Raises:
        ConfigError: The counts are impossible, or a setting is out of range.
    """
    require_in_range("the size of the margin", abs(margin), low=0.0, high=1.0, low_open=True, high_open=True)
    require_in_range("alpha", alpha, low=0.0, high=0.5, low_open=True, high_open=True)
    difference = paired_difference(b, c, n, confidence=1.0 - 2.0 * alpha)
    score = _tango_score(b, c, n, margin)
    p_value = NormalDist().cdf(score if margin > 0.0 else -score)
    holds = difference.high < margin if margin > 0.0 else difference.low > margin
    return NonInferiority(difference=difference, margin=margin, p_value=p_value, holds=holds)


def _score_end(b: int, c: int, n: int, z: float, *, inside: float, outside: float) -> float:
    """Return the change between `inside` and `outside` at which Tango's score statistic equals `z`."""
    if abs(_tango_score(b, c, n, outside)) <= abs(z):
        return outside
    near, far = inside, outside
    for _ in range(_BISECTIONS):
        middle = (near + far) / 2.0
        if middle in (near, far):
            break
        if abs(_tango_score(b, c, n, middle)) < abs(z):
            near = middle
        else:
            far = middle
    return (near + far) / 2.0


def _tango_score(b: int, c: int, n: int, change: float) -> float:
    """Return the score statistic of the hypothesis that the true change is `change`; it falls as `change` grows."""
    # Maximum likelihood of the losing share under the hypothesis: the larger root of a quadratic.
    linear = -b - c + (2 * n - b + c) * change
    constant = -c * change * (1.0 - change)
    losing = (math.sqrt(max(0.0, linear * linear - 8.0 * n * constant)) - linear) / (4.0 * n)
    variance = n * (2.0 * losing + change * (1.0 - change))
    excess = b - c - n * change
    if variance <= 0.0:
        return math.copysign(math.inf, excess) if excess else 0.0
    return excess / math.sqrt(variance)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given: they hold the family-wise error."""
    _require_p_values(p_values)
    adjusted = [0.0] * len(p_values)
    reached = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = reached
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Return the Benjamini-Hochberg adjusted p-values, in the order given: they hold the false discovery rate."""
    _require_p_values(p_values)
    adjusted = [0.0] * len(p_values)
    reached = 1.0
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank in range(len(order), 0, -1):
        index = order[rank - 1]
        reached = min(reached, p_values[index] * len(p_values) / rank)
        adjusted[index] = reached
    return adjusted


def required_pairs(
    discordant_share: float, change: float, *, alpha: float = 0.05, power: float = 0.8, two_sided: bool = True
) -> int:
    """Return how many pairs show a net change with the wanted power (normal approximation, rounded up).

    The exact test needs a few more: `mcnemar_power` says what a number of pairs really gives.

    Args:
        discordant_share: Share of pairs that change either way, at least `change`.
        change: Net change in size, 0 < change <= 1.
        alpha: Level of the test.
        power: Chance of seeing the change when it is there.
        two_sided: Whether the test looks for either direction.

    Raises:
        ConfigError: A share is out of range, or fewer pairs are discordant than the net change needs.
    """
    require_in_range("change", change, low=0.0, high=1.0, low_open=True)
    require_in_range("discordant_share", discordant_share, low=change, high=1.0)
    return math.ceil(_pairs(discordant_share, change, alpha=alpha, power=power, two_sided=two_sided) - 1e-9)


def required_per_arm(
    before: float, after: float, *, alpha: float = 0.05, power: float = 0.8, two_sided: bool = True
) -> int:
    """Return the items per arm that show `before` against `after` on different items (variance pooled under the null).

    Raises:
        ConfigError: A rate is outside [0, 1] or both are equal.
    """
    require_in_range("before", before, low=0.0, high=1.0)
    require_in_range("after", after, low=0.0, high=1.0)
    require_in_range("the change from before to after", abs(after - before), low=0.0, low_open=True)
    z_alpha, z_power = _quantiles(alpha, power, two_sided)
    middle = (before + after) / 2.0
    null = z_alpha * math.sqrt(2.0 * middle * (1.0 - middle))
    shifted = z_power * math.sqrt(before * (1.0 - before) + after * (1.0 - after))
    return math.ceil(((null + shifted) / (after - before)) ** 2 - 1e-9)


def minimum_detectable_change(
    n: int,
    discordant_share: float,
    *,
    alpha: float = 0.05,
    power: float = 0.8,
    two_sided: bool = True,
    design_effect: float = 1.0,
) -> float:
    """Return the smallest net change that the exact McNemar test on `n` pairs would show with the wanted power.

    A change larger than `discordant_share` needs more discordant pairs than that; then all of them are taken to
    change one way. Power is counted, not approximated, up to 20,000 discordant pairs.

    Args:
        n: Number of pairs, at least 1.
        discordant_share: Share of pairs that change either way, as observed or expected.
        alpha: Level of the test.
        power: Chance of seeing the change when it is there.
        two_sided: Whether the test looks for either direction.
        design_effect: Variance by clusters over variance by items; above 1 the pairs count for that much fewer.

    Returns:
        A share in (0, 1]; 1.0 means that not even a change of every pair would surely show.

    Raises:
        ConfigError: A setting is out of range.
    """
    _require_pairs(0, 0, n)
    require_in_range("discordant_share", discordant_share, low=0.0, high=1.0)
    require_in_range("design_effect", design_effect, low=0.0, low_open=True)
    _quantiles(alpha, power, two_sided)
    pairs = max(1, math.floor(n / max(1.0, design_effect)))

    def shows(change: float) -> bool:
        share = max(change, discordant_share)
        if share * pairs > _MOST_COUNTED:
            return _pairs(share, change, alpha=alpha, power=power, two_sided=two_sided) <= pairs
        return mcnemar_power(pairs, share, change, alpha=alpha, two_sided=two_sided) >= power

    low, high = 0.0, 1.0
    while high - low > _CLOSE * high:
        change = (low + high) / 2.0
        low, high = (low, change) if shows(change) else (change, high)
    return high


def _pairs(discordant_share: float, change: float, *, alpha: float, power: float, two_sided: bool) -> float:
    z_alpha, z_power = _quantiles(alpha, power, two_sided)
    null = z_alpha * math.sqrt(discordant_share)
    shifted = z_power * math.sqrt(max(0.0, discordant_share - change * change))
    return ((null + shifted) / change) ** 2


def _quantiles(alpha: float, power: float, two_sided: bool) -> tuple[float, float]:
    require_in_range("alpha", alpha, low=0.0, high=0.5, low_open=True)
    require_in_range("power", power, low=0.5, high=1.0, high_open=True)
    return normal_quantile(1.0 - (alpha / 2.0 if two_sided else alpha)), normal_quantile(power)


def _require_pairs(b: int, c: int, n: int) -> None:
    if b < 0 or c < 0 or b + c > n or (n < 1 and b + c != n):
        raise ConfigError(
            "The counts of changed pairs are impossible.",
            expected="b >= 0, c >= 0 and b + c <= n",
            found=f"b={b}, c={c}, n={n}",
            fix="count each pair once",
        )


def _require_p_values(p_values: Sequence[float]) -> None:
    for p_value in p_values:
        require_in_range("p_value", p_value, low=0.0, high=1.0)
