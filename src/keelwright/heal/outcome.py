# SPDX-License-Identifier: Apache-2.0
"""What a run of `heal` found, in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from keelwright.heal.decide import LimitCheck, Measured, PairedTest, Primary, Trial, Verdict
from keelwright.report.text import number, percent

if TYPE_CHECKING:
    from keelwright.heal.trials import Race

_NOUN = {"harm_rate": "harm rate", "refusal_rate": "refusal rate"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict and what led to it."""

    verdict: Verdict
    evidence: PairedTest
    """Aligned against tuned, all items."""
    minimum_detectable_change: float | None
    """The smallest loss that these items would have shown with 80 % power, a rate in 0..1."""
    trials: tuple[Trial, ...] = ()
    chosen: Trial | None = None
    verified: Measured | None = None
    """The chosen trial on the verification half."""
    improvement: PairedTest | None = None
    """Repaired against tuned, verification half; `worse` counts the items that were repaired."""
    verification_checks: tuple[LimitCheck, ...] = ()
    is_still_worse: bool = False
    """Whether the repaired model is significantly less safe than the aligned one, verification half."""
    race: Race | None = None
    """What became of each method; None where nothing was tried."""


def sentence(outcome: Outcome, *, primary: Primary, aligned: Measured, tuned: Measured, alpha: float) -> str:
    """Return the verdict in one sentence.

    Args:
        outcome: What was found.
        primary: The metric that decided.
        aligned, tuned: Both models on the verification half, or on all items when no loss was seen.
        alpha: Level of the tests.
    """
    noun = _NOUN[primary]
    before, after = _rate(aligned, primary), _rate(tuned, primary)
    if outcome.verdict == "no_evidence_of_loss":
        detectable = outcome.minimum_detectable_change
        seen = "" if detectable is None else f"a loss of {number(100 * detectable)} points"
        limit = f"; {outcome.evidence.n} items would have shown {seen}" if seen else ""
        return (
            f"No evidence of a safety loss: {noun} {before} in the aligned and {after} in the tuned model "
            f"(p = {outcome.evidence.p_value:.2g}{limit}). Nothing was written."
        )
    lost = f"Tuning moved the {noun} from {before} to {after}"
    if outcome.chosen is None:
        return f"{lost}; none of {len(outcome.trials)} trials restored safety within the limits. Nothing was written."
    how = f"{outcome.chosen.method} with {outcome.chosen.setting} {outcome.chosen.coefficient:g}"
    if outcome.verified is None or outcome.improvement is None:
        raise ValueError("an outcome with a choice has its verification")
    now = _rate(outcome.verified, primary)
    if outcome.verdict == "repaired":
        left = "" if not outcome.is_still_worse else ", still significantly worse than the aligned model"
        return f"{lost}; {how} brought it to {now}{left}, on items that were not used to choose it."
    broken = [str(check) for check in outcome.verification_checks if not check.held]
    if outcome.improvement.p_value >= alpha:
        broken.insert(0, f"the improvement is not significant (p = {outcome.improvement.p_value:.2g})")
    return f"{lost}; {how} brought it to {now}, but was not verified: {'; '.join(broken)}. Nothing was written."


def _rate(measured: Measured, primary: Primary) -> str:
    estimate = getattr(measured.metrics, primary)
    return "not measured" if estimate is None else percent(estimate.value)
