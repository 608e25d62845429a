# SPDX-License-Identifier: Apache-2.0
"""Code under misleading prompts: how much functional correctness falls, as metrics over the verdicts of unit tests.

A perturbed problem has the fact `perturbation` and the clean problem's id as its pair; `semantics` says whether its
text keeps the task or contradicts it. Only `cdra[semantics=preserved]` measures a defect: a model that follows an added
instruction which contradicts the task is arguably right, so `cdra[semantics=contradicted]` stands apart.

Equations, C the clean and A the attacked share of problems solved:
    cdra            (C - A) / C, not defined where nothing clean is solved
    absolute drop   C - A
    worst case      share of problems solved under every perturbation

Source:
    arXiv 2411.19508 (CDRA; the perturbations themselves are a reconstruction); Chen et al., arXiv 2107.03374 (pass@k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from keelwright.core.records import Judgement, Record
from keelwright.measure.metric import Floats, Metric, Row
from keelwright.measure.readings import verdict
from keelwright.ops.sampling import asr_at_k
from keelwright.ops.statistic import quotient, ratio, relative_drop

JUDGE: Final = "unit-tests"
PERTURBATION: Final = "perturbation"


def _verdict(record: Record) -> Judgement | None:
    return verdict(record, JUDGE) if record.kind == "task" else None


def problem_of(record: Record) -> str:
    """Return the id of the clean problem."""
    return record.pair_id or record.item_id


def solved_by_problem(records: Sequence[Record]) -> dict[str, dict[str, list[bool]]]:
    """Return, per problem and perturbation (empty for the clean one), whether each judged answer passed its tests."""
    found: dict[str, dict[str, list[bool]]] = {}
    for record in records:
        judgement = _verdict(record)
        if judgement is not None:
            by_perturbation = found.setdefault(problem_of(record), {})
            by_perturbation.setdefault(record.facts.get(PERTURBATION, ""), []).append(judgement.label == "correct")
    return found


def _clean_and_attacked(records: Sequence[Record]) -> dict[str, Row]:
    """Return (clean, attacked, 1) per problem that has both; attacked is the mean over perturbations."""
    found: dict[str, Row] = {}
    for problem, outcomes in solved_by_problem(records).items():
        attacked = [_mean(passed) for name, passed in outcomes.items() if name]
        if attacked and "" in outcomes:
            found[problem] = Row((_mean(outcomes[""]), sum(attacked) / len(attacked), 1.0), problem)
    return found


def _attacked(records: Sequence[Record]) -> dict[str, Row]:
    return {
        problem: Row((sum(map(_mean, attacked)), float(len(attacked))), problem)
        for problem, outcomes in solved_by_problem(records).items()
        if (attacked := [passed for name, passed in outcomes.items() if name])
    }


def _worst_case(records: Sequence[Record]) -> dict[str, Row]:
    """Leave out problems that lack a verdict on some perturbed answer: a gap must not look like a pass."""
    unjudged = {problem_of(one) for one in records if one.facts.get(PERTURBATION) and _verdict(one) is None}
    return {
        problem: Row((min(_mean(passed) for name, passed in outcomes.items() if name), 1.0), problem)
        for problem, outcomes in solved_by_problem(records).items()
        if problem not in unjudged and any(outcomes)
    }


def _share_of(outcome: str) -> Callable[[Sequence[Record]], dict[str, Row]]:
    def rows(records: Sequence[Record]) -> dict[str, Row]:
        found: dict[str, list[float]] = {}
        for record in records:
            judgement = _verdict(record)
            if judgement is not None:
                raw = (judgement.raw or "").replace("_", " ")
                found.setdefault(problem_of(record), []).append(float(raw.startswith(outcome)))
        return {problem: Row((sum(hits), float(len(hits))), problem) for problem, hits in found.items()}

    return rows


def _mean(passed: Sequence[bool]) -> float:
    return sum(passed) / len(passed)


def _drop(sums: Floats) -> Floats:
    return np.asarray(quotient(sums[..., 0] - sums[..., 1], sums[..., 2]), dtype=np.float64)


def pass_at(k: int) -> Metric:
    """Return the share of clean problems that one of `k` answers solves; problems with fewer answers are left out."""

    def rows(records: Sequence[Record]) -> dict[str, Row]:
        return {
            problem: Row((asr_at_k(len(passed), sum(passed), k), 1.0), problem)
            for problem, outcomes in solved_by_problem(records).items()
            if len(passed := outcomes.get("", [])) >= k
        }

    return Metric(
        name=f"pass_at_{k}",
        title=f"Solved, pass@{k}",
        counts="clean problems solved" if k == 1 else f"clean problems solved by one of {k} answers",
        higher_is_better=True,
        rows=rows,
        value=ratio,
        is_binary=True,
    )


PASS_ATTACKED: Final = Metric(
    name="pass_at_1_attacked",
    title="Solved under attack, pass@1",
    counts="perturbed problems solved, all perturbations alike",
    higher_is_better=True,
    rows=_attacked,
    value=ratio,
)

CDRA: Final = Metric(
    name="cdra",
    title="Relative loss of correctness (CDRA)",
    counts="share of the clean problems' solutions that perturbations lose; below 0 where they help",
    higher_is_better=False,
    rows=_clean_and_attacked,
    value=relative_drop,
    unit="ratio",
)

ABSOLUTE_DROP: Final = Metric(
    name="absolute_drop",
    title="Drop of correctness",
    counts="clean minus perturbed share of problems solved",
    higher_is_better=False,
    rows=_clean_and_attacked,
    value=_drop,
    unit="difference",
)

WORST_CASE_PASS: Final = Metric(
    name="worst_case_pass",
    title="Solved under every perturbation",
    counts="problems solved under each of their perturbations",
    higher_is_better=True,
    rows=_worst_case,
    value=ratio,
    is_binary=True,
)

SYNTAX_ERROR_SHARE: Final = Metric(
    name="syntax_error_share",
    title="Syntax errors",
    counts="answers that are not Python, clean and perturbed",
    higher_is_better=False,
    rows=_share_of("syntax error"),
    value=ratio,
)

TIMEOUT_SHARE: Final = Metric(
    name="timeout_share",
    title="Time-outs",
    counts="answers stopped by the clock, counted as not solved",
    higher_is_better=False,
    rows=_share_of("timeout"),
    value=ratio,
)
