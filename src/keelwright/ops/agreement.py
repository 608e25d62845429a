# SPDX-License-Identifier: Apache-2.0
"""How far a judge can be trusted: sensitivity, specificity, kappa, and a rate corrected for the judge's errors.

Source:
    Cohen 1960 (kappa), 1968 (weighted); Rogan and Gladen 1978. Half an answer added to either side of the validation
    sample is our choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Estimate
from keelwright.core.seeds import derive_seed
from keelwright.ops.intervals import wilson, zero_events_upper
from keelwright.ops.resampling import (
    Floats,
    Interval,
    codes_of,
    require_settings,
    require_spread,
    resampled_sums,
    sums_by,
)
from keelwright.ops.statistic import RESAMPLES, bootstrap_statistic, quotient
from keelwright.ops.unpaired import fisher_exact

Weights = Literal["nominal", "linear", "quadratic"]
"""How much a disagreement counts: all alike, by the steps between the categories, or by their square."""

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


def weighted_kappa(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    *,
    categories: Sequence[Hashable],
    weights: Weights = "quadratic",
) -> float:
    """Return the weighted kappa of two raters on the same items, for categories in an order.

    Args:
        first, second: One label per item and rater.
        categories: All labels in their order, as `(1, 2, 3, 4, 5)`; neighbours are one step apart.
        weights: `linear` or `quadratic` in the steps; `nominal` gives Cohen's kappa.

    Returns:
        `1 - sum(w * observed) / sum(w * expected)`: 1 for full agreement, 0 for that of chance. 1.0 where both raters
        give every item the same single label.

    Raises:
        DataError: The two have different lengths or are empty, or a label is not among the categories.
        ConfigError: The weights are unknown.
    """
    cells = _cells(first, second, categories)
    found = float(_kappa_of(cells.sum(axis=0)[None, :], _penalties(len(categories), weights))[0])
    return 1.0 if np.isnan(found) else found


def kappa_interval(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    *,
    categories: Sequence[Hashable],
    weights: Weights = "nominal",
    clusters: Sequence[Hashable] | None = None,
    interval: Interval = "bca",
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Return kappa with a bootstrap interval over items or clusters.

    Args:
        first, second, categories, weights: As for `weighted_kappa`.
        clusters, interval, resamples, confidence, seed: As for `bootstrap_statistic`.

    Raises:
        DataError: As for `weighted_kappa`; or there is one item or cluster only, or both raters give every item the
            same single label, so that there is nothing for chance to explain.
        ConfigError: A setting is out of range.
    """
    penalties = _penalties(len(categories), weights)
    cells = _cells(first, second, categories)
    found = bootstrap_statistic(
        cells,
        lambda sums: _kappa_of(sums, penalties),
        clusters=clusters,
        interval=interval,
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )
    if found.low < found.high or found.value < 1.0:
        return found
    # Every pair agrees, so that there is nothing to resample: as many may differ as the bound after no event allows.
    most = zero_events_upper(len(cells) if clusters is None else len(set(clusters)), confidence=confidence)
    shares = cells.mean(axis=0).reshape(len(categories), -1)
    chance = np.einsum("i,j,ij->", shares.sum(axis=1), shares.sum(axis=0), penalties)
    usual = penalties.sum() / np.count_nonzero(penalties)
    return Estimate(found.value, max(-1.0, found.value - float(most * usual / chance)), found.high, found.n)


def _cells(first: Sequence[Hashable], second: Sequence[Hashable], categories: Sequence[Hashable]) -> Floats:
    """Return, per item, a one in the cell of its two labels. Shape `[items, categories ** 2]`."""
    _require_same_length(first, second)
    if len(first) == 0:
        raise DataError("Agreement over no items is not defined.", expected="at least one item", found="none")
    places = {label: place for place, label in enumerate(categories)}
    strange = {label for label in (*first, *second) if label not in places}
    if strange:
        raise DataError(
            "A label is not among the categories.",
            expected=f"one of {', '.join(map(str, categories))}",
            found=", ".join(sorted(map(str, strange))),
            fix="name all categories in their order, and leave out what was not parsed",
        )
    k = len(categories)
    cells = np.zeros((len(first), k * k), dtype=np.float64)
    cells[np.arange(len(first)), [places[a] * k + places[b] for a, b in zip(first, second, strict=True)]] = 1.0
    return cells


def _penalties(k: int, weights: Weights) -> Floats:
    require_choice("weights", weights, ("nominal", "linear", "quadratic"))
    steps = np.abs(np.subtract.outer(np.arange(k), np.arange(k))).astype(np.float64)
    return {"nominal": np.sign(steps), "linear": steps, "quadratic": np.square(steps)}[weights]


def _kappa_of(sums: Floats, penalties: Floats) -> Floats:
    """Return kappa from counts of cells `[..., k * k]`; NaN where chance explains everything."""
    k = len(penalties)
    table = sums.reshape(*sums.shape[:-1], k, k)
    rows, columns = table.sum(axis=-1), table.sum(axis=-2)
    observed = (table * penalties).sum(axis=(-2, -1)) * table.sum(axis=(-2, -1))
    expected = np.einsum("...i,...j,ij->...", rows, columns, penalties)
    return np.asarray(1.0 - quotient(observed, expected), dtype=np.float64)


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


def rogan_gladen_interval(
    flagged: Sequence[bool],
    judge: Confusion,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Return the true rate behind a judge's labels, with an interval for the errors of both samples.

    The audit is resampled by item or cluster, the validation within each true class. So that a judge without an error
    in a small validation sample does not count as perfect, its two rates are resampled as if half a right and half a
    wrong answer more had been seen in each class; the value itself is not changed.

    Args:
        flagged: The judge's label of each item of the audit.
        judge: The judge against people's labels, on other items.
        clusters: One id per item of the audit; whole clusters are drawn. None draws single items.
        resamples: Number of resamples, at least 100.
        confidence: Two-sided coverage, 0 to 1.
        seed: Base seed of the stream of draws.

    Returns:
        The corrected rate, 0 to 1; `n` counts items of the audit.

    Raises:
        ConfigError: A setting is out of range, or the judge is too close to guessing.
        DataError: The audit has one item or cluster only.
    """
    require_settings("percentile", resamples, confidence)
    labels = np.asarray(flagged, dtype=np.float64)
    table = np.stack([labels, np.ones_like(labels)], axis=1)
    groups = table if clusters is None else sums_by(codes_of(clusters, len(table)), table)
    require_spread(len(groups), "item" if clusters is None else "cluster")
    value = rogan_gladen(float(labels.mean()), sensitivity=judge.sensitivity.value, specificity=judge.specificity.value)
    rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "judge error")))
    drawn = resampled_sums(groups, resamples, rng)
    seen = drawn[:, 0] / drawn[:, 1]
    if np.ptp(seen) == 0.0:
        # Labels that all agree cannot be resampled: half a label more of either kind, as for the judge.
        n = len(groups)
        seen = rng.binomial(n, (seen[0] * n + 0.5) / (n + 1), size=resamples) / n
    sensitivity, specificity = (
        rng.binomial(n, (right + 0.5) / (n + 1), size=resamples) / n
        for right, n in ((judge.tp, judge.tp + judge.fn), (judge.tn, judge.tn + judge.fp))
    )
    informed = sensitivity + specificity - 1.0
    usable = informed > 0.0
    corrected = quotient(seen + specificity - 1.0, informed)[usable].clip(0.0, 1.0)
    if usable.mean() < 1.0 - (1.0 - confidence) / 2.0:
        raise ConfigError(
            "The validation sample is too small to correct for this judge.",
            expected="sensitivity + specificity above 1 in nearly all resamples",
            found=f"{judge.tp} of {judge.tp + judge.fn} and {judge.tn} of {judge.tn + judge.fp} right",
            fix="label more answers by hand, or use a better judge",
        )
    tail = (1.0 - confidence) / 2.0
    low, high = (float(end) for end in np.quantile(corrected, (tail, 1.0 - tail)))
    return Estimate(value=value, low=min(low, value), high=max(high, value), n=len(labels))


@dataclass(frozen=True, slots=True)
class JudgeShift:
    """Whether a judge errs differently before and after a change: then the paired comparison is biased."""

    before: Confusion
    after: Confusion
    sensitivity_p: float
    """Fisher's exact p-value of equal sensitivity."""
    specificity_p: float
    """Fisher's exact p-value of equal specificity."""
    alpha: float

    @property
    def biased(self) -> bool:
        """Whether either differs at `alpha`, each tested at half of it."""
        return min(self.sensitivity_p, self.specificity_p) < self.alpha / 2.0

    @property
    def sentence(self) -> str:
        """The finding in one sentence."""
        parts = []
        for name, p_value in (("sensitivity", self.sensitivity_p), ("specificity", self.specificity_p)):
            first, second = getattr(self.before, name), getattr(self.after, name)
            shares = f"{first.value:.2f} of {first.n} before, {second.value:.2f} of {second.n} after"
            parts.append(f"{name} {shares} (p = {p_value:.3g})")
        verdict = (
            "the judge errs differently before and after, so the paired comparison is biased"
            if self.biased
            else "no evidence that the judge errs differently before and after"
        )
        return f"{verdict}: {'; '.join(parts)}."


def judge_shift(before: Confusion, after: Confusion, *, alpha: float = 0.05) -> JudgeShift:
    """Test whether a judge's sensitivity or specificity differs between two conditions (Fisher's exact test).

    Args:
        before, after: The judge against people's labels, on answers of either condition.
        alpha: Level of the two tests together.

    Raises:
        ConfigError: A condition has no answer of one true class, so that there is nothing to compare.
    """
    require_in_range("alpha", alpha, low=0.0, high=1.0, low_open=True, high_open=True)
    for name, side in (("before", before), ("after", after)):
        if side.tp + side.fn == 0 or side.tn + side.fp == 0:
            raise ConfigError(
                f"The labels '{name}' lack one true class.",
                expected="answers of both true classes in both conditions",
                found=f"{side.tp + side.fn} true, {side.tn + side.fp} other",
                fix="stratify the sample for labelling by class and by condition",
            )
    return JudgeShift(
        before=before,
        after=after,
        sensitivity_p=fisher_exact(before.tp, before.fn, after.tp, after.fn),
        specificity_p=fisher_exact(before.tn, before.fp, after.tn, after.fp),
        alpha=alpha,
    )


def _require_same_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> None:
    if len(first) != len(second):
        raise DataError(
            "Two raters must have seen the same items.",
            expected=f"{len(first)} labels from each",
            found=f"{len(first)} and {len(second)}",
            fix="pair the labels by item first",
        )
