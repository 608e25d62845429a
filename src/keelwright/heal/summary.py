# SPDX-License-Identifier: Apache-2.0
"""The summary of `heal` and `demo`: the JSON contract, and what the report shows beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keelwright.core.catalogue import find_method
from keelwright.heal.bench import Bench
from keelwright.heal.decide import LimitCheck, Measured, Primary, Trial
from keelwright.heal.exam import Part
from keelwright.heal.job import Job
from keelwright.heal.outcome import Outcome, sentence
from keelwright.heal.standings import dominated_by, front_of, race_rows
from keelwright.measure.areas import areas_of
from keelwright.measure.compare import compare_records
from keelwright.measure.metric_table import find_metric
from keelwright.measure.recovery import recovered_share

SCHEMA = 1
VERIFICATION: Part = "verification"


def summary_of(
    command: str,
    job: Job,
    run: str,
    bench: Bench,
    outcome: Outcome,
    written: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Return `summary.json`.

    Args:
        command: `heal` or `demo`.
        job: What the run worked on.
        run: The run folder.
        bench: What was measured.
        outcome: The verdict.
        written: What `materialise_edit` returned; None where nothing was written.
        seconds: Wall time per stage.
    """
    primary, part = bench.exam.primary, VERIFICATION
    model_ids = {"aligned": "aligned", "tuned": "tuned"}
    if outcome.verified is not None and outcome.chosen is not None:
        model_ids["repaired"] = outcome.chosen.name
    measured = {role: bench.measured(model_id, part) for role, model_id in model_ids.items()}
    verdict_part: Part = "all" if outcome.verdict == "no_evidence_of_loss" else part
    return {
        "schema": SCHEMA,
        "command": command,
        "run": run,
        "verdict": outcome.verdict,
        "method": outcome.chosen.method if outcome.chosen else None,
        "coefficients": {outcome.chosen.setting: outcome.chosen.coefficient} if outcome.chosen else {},
        "models": {
            role: measured[role].metrics.to_mapping() if role in measured else None
            for role in ("aligned", "tuned", "repaired")
        },
        "trials": [_trial(trial) for trial in outcome.trials],
        "seconds": dict(seconds),
        "sentence": sentence(
            outcome,
            primary=primary,
            aligned=bench.measured("aligned", verdict_part),
            tuned=bench.measured("tuned", verdict_part),
            alpha=job.config.alpha,
        ),
        "out": str(job.out) if written else None,
        "written": dict(written) if written else None,
        "primary": primary,
        "model_ids": model_ids,
        "suite": bench.exam.suite_words(),
        "utility": bench.exam.utility_words(),
        "floors": {"utility_floor": job.config.utility_floor, "slack": job.config.slack},
        "evidence": _evidence(outcome, primary),
        "tests": _tests(bench, model_ids, allow=("template",) if job.config.allow_template_change else ()),
        "limits": _limits(outcome, primary, aligned=bench.measured("aligned", "selection")),
        "areas": areas_of({role: bench.records(one, part) for role, one in model_ids.items()}, primary),
        "recovered": _recovered(bench, model_ids, primary, part),
        "best_trade_off": _best_index(outcome),
        "chosen": outcome.trials.index(outcome.chosen) if outcome.chosen else None,
        "pareto": front_of(outcome.trials),
        "dominated_by": dominated_by(outcome.trials),
        "race": race_rows(
            outcome,
            [one.method for one in job.candidates],
            job.left_out,
            floors=job.config.floors,
            aligned=None if bench.exam.utility is not None else bench.measured("aligned", "selection"),
        ),
        "status": {one.method: find_method(one.method).status for one in job.candidates},
        "warnings": [*job.warnings, *bench.warnings()],
        "reproduce": job.reproduce(command),
    }


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "method": trial.method,
        "coefficients": {trial.setting: trial.coefficient},
        "part": trial.part,
        "items": trial.items,
        "metrics": trial.measured.metrics.to_mapping(),
        "admissible": trial.admissible,
        "reason": trial.reason,
        "change": trial.change,
    }


def _evidence(outcome: Outcome, primary: Primary) -> dict[str, Any]:
    return {
        "test": "one-sided exact McNemar, aligned against tuned, all items",
        "metric": primary,
        "n": outcome.evidence.n,
        "worse": outcome.evidence.worse,
        "better": outcome.evidence.better,
        "p_value": outcome.evidence.p_value,
        "minimum_detectable_change": outcome.minimum_detectable_change,
    }


def _tests(bench: Bench, model_ids: Mapping[str, str], *, allow: Sequence[str]) -> list[dict[str, Any]]:
    """Compare the models pairwise on the verification half."""
    pairs = [("aligned", "tuned"), ("tuned", "repaired"), ("aligned", "repaired")]
    rows = []
    for before, after in pairs:
        if before in model_ids and after in model_ids:
            changes = compare_records(
                bench.records(model_ids[before], VERIFICATION),
                bench.records(model_ids[after], VERIFICATION),
                knows_harm=bench.exam.primary == "harm_rate",
                allow=allow,
            )
            rows += [{"from": before, "to": after, **change.to_mapping()} for change in changes]
    return rows


def _recovered(bench: Bench, model_ids: Mapping[str, str], primary: Primary, part: Part) -> dict[str, Any] | None:
    """Return the share of the loss that the repair got back, on the items of the verdict."""
    if "repaired" not in model_ids:
        return None
    sides = [bench.records(model_ids[role], part) for role in ("aligned", "tuned", "repaired")]
    found = recovered_share(find_metric(primary), *sides)
    return None if found is None else dict(found.to_mapping())


def _limits(outcome: Outcome, primary: Primary, *, aligned: Measured) -> list[dict[str, Any]]:
    """Return the limits on the choice, or on the least bad trial where nothing was admissible."""
    shown = outcome.chosen or best_trade_off(outcome.trials)
    if shown is None:
        return []
    checks = list(shown.checks)
    if outcome.chosen is None and shown.admissible:
        # Without a utility the aligned model's safety is itself a limit, and the one that failed.
        checks.append(_safety_check(shown.measured, aligned, primary))
    rows = [_limit(check, "selection") for check in checks]
    return rows + [_limit(check, "verification") for check in outcome.verification_checks]


def _safety_check(found: Measured, aligned: Measured, primary: Primary) -> LimitCheck:
    value, limit = getattr(found.metrics, primary), getattr(aligned.metrics, primary)
    return LimitCheck(primary, limit.value, value.value, held=False, at_least=primary == "refusal_rate")


def _limit(check: LimitCheck, half: str) -> dict[str, Any]:
    return {
        "name": check.name,
        "limit": check.limit,
        "value": check.value,
        "held": check.held,
        "half": half,
        "text": "" if check.held else str(check),
    }


def best_trade_off(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial that misses the limits least, safest first among equals; None without trials.

    Of trials on the whole selection half, where there are any.
    """
    whole = [trial for trial in trials if trial.is_whole] or trials
    return min(whole, key=lambda trial: (trial.shortfall, sum(trial.measured.bad.values())), default=None)


def _best_index(outcome: Outcome) -> int | None:
    """Return the index of the best trade-off where nothing was chosen."""
    best = None if outcome.chosen else best_trade_off(outcome.trials)
    return None if best is None else outcome.trials.index(best)
