# SPDX-License-Identifier: Apache-2.0
"""Metrics by name, looked up lazily.

A name may end in a condition in square brackets: `user_helpfulness[domain=QA]`, `cdra[semantics=preserved]`,
`over_refusal[judge=refusal-classifier]`, `rr_any[hazard=fraud]`, `asr[set=harmbench]`. Several are joined by commas.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from keelwright.core.config import nearest, require_in_range
from keelwright.core.errors import ConfigError
from keelwright.core.records import Record
from keelwright.measure.metric import Metric, Row
from keelwright.measure.metrics import METRICS
from keelwright.measure.readings import narrowed
from keelwright.measure.scorer_metrics import mean_score

_ROOM: Final = "keelwright.measure"
_PATHS: Final = {
    "rr_any": "refusal_metrics:RR_ANY",
    "rr_half": "refusal_metrics:RR_HALF",
    "rr_full": "refusal_metrics:RR_FULL",
    "over_refusal_half": "refusal_metrics:OVER_REFUSAL_HALF",
    "over_refusal_full": "refusal_metrics:OVER_REFUSAL_FULL",
    "contrast_gap": "refusal_metrics:CONTRAST_GAP",
    "balanced_refusal_accuracy": "refusal_metrics:BALANCED_REFUSAL_ACCURACY",
    "refused_under_every_wrap": "wrap_metrics:REFUSED_UNDER_EVERY_WRAP",
    "truncated": "answer_metrics:TRUNCATED",
    "unjudged": "answer_metrics:UNJUDGED",
    "asr": "harm_metrics:ASR",
    "asr_keyword": "harm_metrics:ASR_KEYWORD",
    "harmfulness_score": "harm_metrics:HARMFULNESS_SCORE",
    "harmfulness_rate": "harm_metrics:HARMFULNESS_RATE",
    "usable_harm": "harm_metrics:USABLE_HARM",
    "mean_toxicity": "toxicity_metrics:MEAN_TOXICITY",
    "toxic_fraction": "toxicity_metrics:TOXIC_FRACTION",
    "user_safety": "user_metrics:USER_SAFETY",
    "user_helpfulness": "user_metrics:USER_HELPFULNESS",
    "user_overall": "user_metrics:USER_OVERALL",
    "user_sensitivity": "user_metrics:USER_SENSITIVITY",
    "user_harm": "user_metrics:USER_HARM",
    "profile_over_refusal": "user_metrics:PROFILE_OVER_REFUSAL",
    "profile_cost": "user_metrics:PROFILE_COST",
    "pass_at_1_attacked": "code_metrics:PASS_ATTACKED",
    "cdra": "code_metrics:CDRA",
    "absolute_drop": "code_metrics:ABSOLUTE_DROP",
    "worst_case_pass": "code_metrics:WORST_CASE_PASS",
    "syntax_error_share": "code_metrics:SYNTAX_ERROR_SHARE",
    "timeout_share": "code_metrics:TIMEOUT_SHARE",
}
_OF_K: Final = {
    "asr_at": "harm_metrics:attack_success_at",
    "expected_maximum_toxicity": "toxicity_metrics:expected_maximum_toxicity",
    "maximum_toxicity_sd": "toxicity_metrics:maximum_toxicity_sd",
    "toxicity_probability": "toxicity_metrics:toxicity_probability",
    "pass_at": "code_metrics:pass_at",
}
"""Metrics over k answers, which their names end in: `asr_at_5`."""

_OF_JUDGE: Final = {"score": True, "cost": False}
"""Means of one judge's scores, and whether more is better: `score:match`."""

METRIC_NAMES: Final = (*METRICS, *_PATHS, *(f"{name}_K" for name in _OF_K))
"""Every metric; K stands for a number."""

_CONDITION: Final = re.compile(r"\s*(\w+)\s*=\s*([^,\[\]]+?)\s*")


def find_metric(name: str) -> Metric:
    """Return a metric by name, with or without a condition in brackets.

    Raises:
        ConfigError: There is no such metric, its k is below 1, or the brackets cannot be read.
    """
    base, bracket, inside = name.partition("[")
    metric = _plain(base.strip())
    return _narrow(metric, name, inside) if bracket else metric


def answers_needed(name: str) -> int:
    """Return how many answers to an item a metric needs at least: the K at the end of its name, else 1."""
    stem, _, number = name.partition("[")[0].strip().rpartition("_")
    return int(number) if stem in _OF_K and number.isdecimal() else 1


def _plain(name: str) -> Metric:
    if name in METRICS:
        headline: Metric = importlib.import_module(f"{_ROOM}.headline").HEADLINE[name]
        return headline
    if name in _PATHS:
        metric: Metric = _attribute(_PATHS[name])
        return metric
    kind, colon, judge = name.partition(":")
    if colon and kind in _OF_JUDGE:
        return mean_score(judge, higher_is_better=_OF_JUDGE[kind])
    stem, _, number = name.rpartition("_")
    if stem not in _OF_K or not number.isdecimal():
        raise ConfigError(
            f"There is no metric '{name}'.",
            expected=f"one of {', '.join(METRIC_NAMES)}",
            found=name,
            fix=f"write a number for K, as in {stem}_5" if stem in _OF_K else nearest(name, METRIC_NAMES),
        )
    require_in_range(f"K of {name}", int(number), low=1)
    factory: Callable[[int], Metric] = _attribute(_OF_K[stem])
    return factory(int(number))


def _attribute(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(f"{_ROOM}.{module}"), attribute)


def _narrow(metric: Metric, name: str, inside: str) -> Metric:
    conditions = [_CONDITION.fullmatch(one) for one in inside.removesuffix("]").split(",")]
    if not inside.endswith("]") or any(one is None for one in conditions):
        raise ConfigError(
            f"The metric '{name}' cannot be read.",
            expected="NAME[FACT=VALUE], as in user_helpfulness[domain=QA]",
            found=name,
            fix="mend the brackets",
        )
    pairs = [(one[1], one[2]) for one in conditions if one is not None]

    def rows(records: Sequence[Record]) -> dict[str, Row]:
        for fact, value in pairs:
            records = narrowed(records, fact, value)
        return dict(metric.rows(records))

    said = ", ".join(f"{fact} {value}" for fact, value in pairs)
    canonical = ",".join(f"{fact}={value}" for fact, value in pairs)
    return dataclasses.replace(
        metric,
        name=f"{metric.name}[{canonical}]",
        title=f"{metric.title} ({said})",
        counts=f"{metric.counts}; only {said}",
        rows=rows,
    )
