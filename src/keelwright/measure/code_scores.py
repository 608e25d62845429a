# SPDX-License-Identifier: Apache-2.0
"""Robustness of code, problem by problem: what each perturbation loses and gains, and what a remedy brings back.

The rates with their intervals are metrics (`measure.code_metrics`); this is the table behind them: per perturbation the
paired drop and its exact test, and the problems that flipped. Perturbations that keep the task and those that
contradict it are never summed up together.

Equations, C the clean and A the attacked share of problems solved:
    cdra        (C - A) / C, None at C = 0
    recovered   (cdra before - cdra after) / cdra before, None where nothing was lost
    pass@k      1 - C(n - c, k) / C(n, k)

Source:
    arXiv 2411.19508 (CDRA); Chen et al., arXiv 2107.03374 (pass@k).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from keelwright.core.errors import DataError
from keelwright.core.records import Estimate, Record
from keelwright.measure.code_metrics import JUDGE, PERTURBATION, problem_of
from keelwright.measure.readings import verdict
from keelwright.ops.intervals import wilson
from keelwright.ops.paired import holm, mcnemar_exact, paired_difference
from keelwright.ops.sampling import asr_at_k

Outcomes: TypeAlias = Mapping[str, str]
"""The tests' outcome per problem: `passed`, `failed`, `syntax error`, `timeout`, `limit` or `escaped`."""

PASSED, SYNTAX_ERROR, TIMEOUT = "passed", "syntax error", "timeout"


@dataclass(frozen=True, slots=True)
class Robustness:
    """Clean against perturbed, over the problems that have both."""

    perturbation: str
    semantics: str
    """preserved: a failure is the model's; contradicted: a model that obeys the added text is arguably right."""
    clean: Estimate
    attacked: Estimate
    drop: Estimate
    """Clean minus attacked, with Tango's paired interval; above 0 where the perturbation hurts."""
    cdra: float | None
    p_value: float
    """Exact McNemar, two-sided, for this perturbation alone."""
    p_adjusted: float
    """After Holm, over the perturbations of the table."""
    lost: tuple[str, ...]
    """Problems solved clean and not under the perturbation."""
    gained: tuple[str, ...]
    """Problems solved under the perturbation and not clean."""
    syntax_errors: float
    """Share of the perturbed answers that are not Python, 0 to 1."""
    timeouts: int
    """Perturbed answers stopped by the clock; they count as not solved."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that one of `k` samples solves a problem, from `c` right ones of `n` drawn.

    Raises:
        ConfigError: The counts are impossible.
    """
    return asr_at_k(n, c, k)


def cdra(clean: float, attacked: float) -> float | None:
    """Return the share of the clean solutions that the perturbation loses; None where nothing clean is solved.

    Args:
        clean: Share of problems solved clean, 0 to 1.
        attacked: Share of the same problems solved under the perturbation.
    """
    return None if clean == 0.0 else (clean - attacked) / clean


def recovered_share(before: float | None, after: float | None) -> float | None:
    """Return the share of a loss that a remedy brings back; None where there was none, or where one is not known.

    Args:
        before: CDRA without the remedy.
        after: CDRA with it, against the clean run with it too.
    """
    if before is None or after is None or before <= 0.0:
        return None
    return (before - after) / before


def worst_case(attacked: Mapping[str, Outcomes]) -> Estimate | None:
    """Return the share of problems solved under every perturbation; None where no problem has them all.

    Args:
        attacked: Outcomes by perturbation.
    """
    runs = list(attacked.values())
    problems = set.intersection(*(set(run) for run in runs)) if runs else set()
    if not problems:
        return None
    return wilson(sum(all(run[problem] == PASSED for run in runs) for problem in problems), len(problems))


def robustness(
    clean: Outcomes, attacked: Outcomes, *, perturbation: str = "", semantics: str = ""
) -> Robustness | None:
    """Return clean against one perturbation, over the problems that have both; None where there are none.

    Args:
        clean: Outcomes of the clean problems.
        attacked: Outcomes of the same problems under the perturbation.
        perturbation: Its name.
        semantics: What it does to the task.
    """
    both = sorted(clean.keys() & attacked.keys())
    if not both:
        return None
    n = len(both)
    lost = tuple(one for one in both if clean[one] == PASSED != attacked[one])
    gained = tuple(one for one in both if attacked[one] == PASSED != clean[one])
    solved = sum(clean[one] == PASSED for one in both)
    under = solved - len(lost) + len(gained)
    p_value = mcnemar_exact(len(gained), len(lost))
    return Robustness(
        perturbation=perturbation,
        semantics=semantics,
        clean=wilson(solved, n),
        attacked=wilson(under, n),
        drop=paired_difference(len(lost), len(gained), n),
        cdra=cdra(solved / n, under / n),
        p_value=p_value,
        p_adjusted=p_value,
        lost=lost,
        gained=gained,
        syntax_errors=sum(attacked[one] == SYNTAX_ERROR for one in both) / n,
        timeouts=sum(attacked[one] == TIMEOUT for one in both),
    )


def outcomes_of(records: Sequence[Record]) -> dict[str, dict[str, str]]:
    """Return the outcome per perturbation (empty for the clean run) and problem, from one model's records.

    Raises:
        DataError: A problem has several answers: what flips between samples is not the perturbation's doing.
    """
    found: dict[str, dict[str, str]] = {}
    for record in records:
        judgement = verdict(record, JUDGE)
        if judgement is None:
            continue
        if record.samples > 1:
            raise DataError(
                "Flips need one answer per problem.",
                expected="greedy answers, one per problem and perturbation",
                found=f"{record.samples} samples of '{record.item_id}'",
                fix="use the metrics pass_at_k and cdra for sampled answers",
            )
        run = found.setdefault(record.facts.get(PERTURBATION, ""), {})
        run[problem_of(record)] = judgement.raw or ("passed" if judgement.label == "correct" else "failed")
    return found


def robustness_table(records: Sequence[Record]) -> list[Robustness]:
    """Return a row per perturbation: those that keep the task first, in each group the largest drop first.

    Args:
        records: One model's records, clean and perturbed, judged by `unit-tests`.

    Raises:
        DataError: A problem has several answers.
    """
    outcomes = outcomes_of(records)
    clean = outcomes.pop("", {})
    semantics = {record.facts.get(PERTURBATION, ""): record.facts.get("semantics", "") for record in records}
    rows = [
        row
        for name, attacked in outcomes.items()
        if (row := robustness(clean, attacked, perturbation=name, semantics=semantics[name])) is not None
    ]
    adjusted = holm([row.p_value for row in rows])
    rows = [replace(row, p_adjusted=p) for row, p in zip(rows, adjusted, strict=True)]
    return sorted(rows, key=lambda row: (row.semantics != "preserved", -row.drop.value, row.perturbation))


def worst_cases(records: Sequence[Record]) -> dict[str, Estimate]:
    """Return the share of problems solved under every perturbation, apart for each kind of semantics.

    Args:
        records: One model's records.

    Raises:
        DataError: A problem has several answers.
    """
    outcomes = outcomes_of(records)
    semantics = {record.facts.get(PERTURBATION, ""): record.facts.get("semantics", "") for record in records}
    found: dict[str, Estimate] = {}
    for kind in sorted({semantics[name] for name in outcomes if name}):
        estimate = worst_case({name: run for name, run in outcomes.items() if name and semantics[name] == kind})
        if estimate is not None:
            found[kind] = estimate
    return found
