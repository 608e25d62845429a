# SPDX-License-Identifier: Apache-2.0
"""Can this judge be trusted, and as much after the change as before it?

A judge is held against people's labels, condition by condition (the model before and after a change). Per condition:
agreement beyond chance, sensitivity and specificity, each with its interval. Between conditions: whether the judge errs
differently, for then a paired comparison is biased, however many items it has. With the judge's labels on an audit,
the rate that people would have found (Rogan and Gladen), with an interval for the errors of both samples.

*Equation*: corrected = (observed + specificity - 1) / (sensitivity + specificity - 1), refused where sensitivity and
specificity add up to no more than 1.1.
*Source*: Cohen 1960, 1968; Rogan and Gladen 1978; Fisher's exact test.
*Limits*: the labels are the truth here; how far people agree with each other is a question for `rate_by_column`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from keelwright.core.config import require_choice
from keelwright.core.errors import ConfigError, DataError
from keelwright.core.protocols import Judge
from keelwright.core.records import Estimate
from keelwright.measure.labels import CLASSES, POSITIVE, Labelled, Rated, Scale, rate_by_judge, scale_of
from keelwright.ops.agreement import (
    Confusion,
    JudgeShift,
    Weights,
    confusion,
    judge_shift,
    kappa_interval,
    rogan_gladen_interval,
)
from keelwright.ops.calibration import ReliabilityBin, expected_calibration_error, reliability_table

ENOUGH: Final = 200
"""Labels below which a judge's figures are too uncertain to rest a claim on."""
ENOUGH_PER_CLASS: Final = 20
"""Labels of one class and condition below which its share is hardly known."""

Unparsed = Literal["exclude", "count"]
"""What becomes of replies that could not be read: left out and counted; or a class of its own that agrees with no
label and is never positive, as when a published table took them for 'no refusal'."""

_UNPARSED: Final = "unparsed"


@dataclass(frozen=True, slots=True)
class Agreement:
    """A judge against people, in one condition."""

    condition: str
    n: int
    """Labels that were compared."""
    excluded: int
    """Labels without a verdict that could be read."""
    counts: Confusion
    """Positive against negative: any refusal, any harm, a score of 5."""
    kappa: Estimate | None
    """Of positive and negative; None where everything is of one class, or there is one label only."""
    kappa_classes: Estimate | None
    """Of all classes of the scale."""
    kappa_weighted: Estimate | None
    """With quadratic weights, for the five levels; None for other scales."""
    corrected: Estimate | None = None
    """The rate that people would have found in the audit."""
    not_corrected: str = ""
    """Why there is no corrected rate."""

    @property
    def sensitivity(self) -> Estimate | None:
        """Share of true positives that the judge finds; None without any."""
        return self.counts.sensitivity if self.counts.tp + self.counts.fn else None

    @property
    def specificity(self) -> Estimate | None:
        """Share of true negatives that the judge leaves alone; None without any."""
        return self.counts.specificity if self.counts.tn + self.counts.fp else None

    def to_mapping(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        estimates = {
            name: getattr(self, name)
            for name in ("sensitivity", "specificity", "kappa", "kappa_classes", "kappa_weighted", "corrected")
        }
        return {
            "condition": self.condition,
            "n": self.n,
            "excluded": self.excluded,
            "counts": {name: getattr(self.counts, name) for name in ("tp", "fn", "fp", "tn")},
            **{name: None if one is None else one.to_mapping() for name, one in estimates.items()},
            "not_corrected": self.not_corrected or None,
        }


@dataclass(frozen=True, slots=True)
class Validation:
    """A judge against people, in every condition."""

    judge_id: str
    scale: Scale
    agreements: tuple[Agreement, ...]
    shifts: Mapping[tuple[str, str], JudgeShift]
    """Between each two conditions that have both classes."""
    reliability: tuple[ReliabilityBin, ...]
    """The judge's score, brought to 0..1, against the positive share; empty for a judge without scores."""
    warnings: tuple[str, ...]

    @property
    def is_biased(self) -> bool:
        """Whether the judge errs differently in two conditions: a paired comparison by it is biased."""
        return any(shift.biased for shift in self.shifts.values())

    def to_mapping(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "judge": self.judge_id,
            "scale": self.scale,
            "conditions": [one.to_mapping() for one in self.agreements],
            "is_biased": self.is_biased,
            "shifts": [
                {
                    "conditions": list(pair),
                    "sensitivity_p": shift.sensitivity_p,
                    "specificity_p": shift.specificity_p,
                    "alpha": shift.alpha,
                    "biased": shift.biased,
                }
                for pair, shift in self.shifts.items()
            ],
            "reliability": [
                {"low": one.low, "high": one.high, "mean_score": one.mean_score, "share": one.share.to_mapping()}
                for one in self.reliability
            ],
            "calibration_error": expected_calibration_error(self.reliability) if self.reliability else None,
            "warnings": list(self.warnings),
        }


def validate_judge(
    labelled: Sequence[Labelled],
    judge: Judge,
    *,
    scale: Scale | None = None,
    audits: Mapping[str, Sequence[bool]] | None = None,
    seed: int = 0,
) -> Validation:
    """Judge labelled answers and hold the verdicts against the labels.

    Args:
        labelled: What people said, see `measure.labels.read_labels`.
        judge: Who is held against them; all answers are judged at once where it can.
        scale: What the labels tell apart; None: read from them.
        audits: The judge's positives on an audit, item by item, by condition: their rates are corrected.
        seed: Of the bootstraps.

    Raises:
        DataError: There are no labels, or labels of no scale.
    """
    found = scale or scale_of(labelled)
    return validate(rate_by_judge(labelled, judge, found), found, judge_id=judge.judge_id, audits=audits, seed=seed)


def validate(
    rated: Sequence[Rated],
    scale: Scale,
    *,
    judge_id: str,
    unparsed: Unparsed = "exclude",
    audits: Mapping[str, Sequence[bool]] | None = None,
    alpha: float = 0.05,
    seed: int = 0,
) -> Validation:
    """Return how a judge's verdicts agree with the truth, by condition.

    Args:
        rated: Truth and verdict per answer.
        scale: What both tell apart.
        judge_id: Whose verdicts they are.
        unparsed: What becomes of verdicts that could not be read.
        audits: The judge's positives on an audit, item by item, by condition: their rates are corrected.
        alpha: Level of the test between two conditions, shared by all pairs.
        seed: Of the bootstraps.

    Raises:
        DataError: There is nothing to compare in some condition.
        ConfigError: An audit's condition has no labels, or a setting is out of range.
    """
    require_choice("scale", scale, tuple(CLASSES))
    require_choice("unparsed", unparsed, ("exclude", "count"))
    by_condition: dict[str, list[Rated]] = {}
    for one in rated:
        by_condition.setdefault(one.condition, []).append(one)
    if not by_condition:
        raise DataError("A judge cannot be validated without labels.", expected="at least one label", found="none")
    for condition in audits or {}:
        require_choice("condition of the audit", condition, tuple(by_condition))
    agreements = []
    for condition, rows in by_condition.items():
        found = _agreement(condition, rows, scale, unparsed, seed)
        agreements.append(_corrected(found, (audits or {}).get(condition), seed))
    shifts = _shifts(agreements, alpha)
    return Validation(
        judge_id=judge_id,
        scale=scale,
        agreements=tuple(agreements),
        shifts=shifts,
        reliability=tuple(_reliability(rated, scale)),
        warnings=tuple(_warnings(agreements, shifts)),
    )


def _agreement(condition: str, rows: Sequence[Rated], scale: Scale, unparsed: Unparsed, seed: int) -> Agreement:
    pairs = [(one.truth, one.said or _UNPARSED) for one in rows if one.said is not None or unparsed == "count"]
    if not pairs:
        raise DataError(
            f"No verdict on '{condition}' could be read.",
            expected="at least one verdict",
            found=f"{len(rows)} labels, none with a verdict",
            fix="use another judge: this one does not keep to its format",
        )
    truth, said = [one for one, _ in pairs], [one for _, one in pairs]
    classes = (*CLASSES[scale], _UNPARSED) if unparsed == "count" else CLASSES[scale]
    is_true = [one in POSITIVE[scale] for one in truth]
    is_said = [one in POSITIVE[scale] for one in said]
    is_weighted = scale == "score" and unparsed == "exclude"
    return Agreement(
        condition=condition,
        n=len(pairs),
        excluded=len(rows) - len(pairs),
        counts=confusion(is_true, is_said),
        kappa=_kappa(is_true, is_said, (False, True), seed=seed),
        kappa_classes=_kappa(truth, said, classes, seed=seed),
        kappa_weighted=_kappa(truth, said, classes, weights="quadratic", seed=seed) if is_weighted else None,
    )


def _kappa(
    truth: Sequence[str | bool],
    said: Sequence[str | bool],
    classes: Sequence[str | bool],
    *,
    weights: Weights = "nominal",
    seed: int,
) -> Estimate | None:
    """Return kappa with its interval; None where chance explains everything, or too little can be resampled."""
    if len(truth) < 2 or len({*truth, *said}) < 2:
        return None
    try:
        return kappa_interval(truth, said, categories=classes, weights=weights, seed=seed)
    except DataError:
        # So few labels of one class that many resamples have none of it: there is no interval to show, so no figure.
        return None


def _corrected(found: Agreement, audit: Sequence[bool] | None, seed: int) -> Agreement:
    if audit is None:
        return found
    try:
        if found.sensitivity is None or found.specificity is None:
            raise ConfigError("The labels lack one class, so the judge's errors are not known.")
        corrected = rogan_gladen_interval(audit, found.counts, seed=seed)
    except (ConfigError, DataError) as error:
        return dataclasses.replace(found, not_corrected=error.problem)
    return dataclasses.replace(found, corrected=corrected)


def _shifts(agreements: Sequence[Agreement], alpha: float) -> dict[tuple[str, str], JudgeShift]:
    usable = [one for one in agreements if one.sensitivity is not None and one.specificity is not None]
    pairs = list(itertools.combinations(usable, 2))
    return {
        (before.condition, after.condition): judge_shift(before.counts, after.counts, alpha=alpha / len(pairs))
        for before, after in pairs
    }


def _reliability(rated: Sequence[Rated], scale: Scale) -> list[ReliabilityBin]:
    """Return the judge's scores against the positive share, where it gives scores that can be brought to 0..1."""
    scored = [(one.score, one.truth in POSITIVE[scale]) for one in rated if one.score is not None]
    if not scored or scale == "refusal":
        return []
    scores = [score for score, _ in scored]
    truth = [positive for _, positive in scored]
    if all(0.0 <= score <= 1.0 for score in scores) and any(score < 1.0 for score in scores):
        return reliability_table(scores, truth)
    if all(1.0 <= score <= 5.0 for score in scores):
        return reliability_table([(score - 1.0) / 4.0 for score in scores], truth, bins=5)
    return []


def _warnings(agreements: Sequence[Agreement], shifts: Mapping[tuple[str, str], JudgeShift]) -> list[str]:
    found = []
    total = sum(one.n for one in agreements)
    if total < ENOUGH:
        found.append(f"{total} labels: fewer than {ENOUGH}, too few to rest a claim on this judge.")
    for one in agreements:
        for name, count in (
            ("positive", one.counts.tp + one.counts.fn),
            ("negative", one.counts.tn + one.counts.fp),
        ):
            if count < ENOUGH_PER_CLASS:
                found.append(f"'{one.condition}' has {count} {name} labels, fewer than {ENOUGH_PER_CLASS}.")
        if one.excluded:
            found.append(f"'{one.condition}': {one.excluded} of {one.n + one.excluded} verdicts could not be read.")
        if one.not_corrected:
            found.append(f"'{one.condition}': the rate is not corrected. {one.not_corrected}")
    for (before, after), shift in shifts.items():
        if shift.biased:
            found.append(f"Paired comparison is biased between '{before}' and '{after}': {shift.sentence}")
    return found
