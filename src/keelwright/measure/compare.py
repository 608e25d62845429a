# SPDX-License-Identifier: Apache-2.0
"""Two audits of the same items: the paired change of every metric that both sides have, as one family.

Numbers that were made under different conditions are not compared, and the error says which condition differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from keelwright.core.config import require_choice
from keelwright.core.errors import DataError
from keelwright.core.records import Record
from keelwright.measure.areas import by_area
from keelwright.measure.change import ALPHA, Alternative, Change, Verdict, change_of, detectable_in
from keelwright.measure.metric import Metric
from keelwright.measure.metric_table import find_metric
from keelwright.measure.metrics import METRICS, RULES, flags
from keelwright.measure.readings import HARM_JUDGES, name_of
from keelwright.measure.readings import knows_harm as tells_harm
from keelwright.ops.paired import benjamini_hochberg, holm

__all__ = [
    "ALPHA",
    "STAND_ALONE",
    "Alternative",
    "Change",
    "Verdict",
    "change_in",
    "compare_areas",
    "compare_records",
    "is_comparable",
    "require_same_conditions",
]

INCOHERENT_SHIFT = 0.10
"""A shift of the incoherent share beyond this makes the other rates not comparable."""


def change_in(
    before: Sequence[Record], after: Sequence[Record], metric: str, *, alternative: Alternative = "two-sided"
) -> Change:
    """Return the paired change of one metric over the items that both sides have.

    Args:
        before, after: One model's records each.
        metric: Name of the metric.
        alternative: What the test looks for.

    Raises:
        DataError: The two were measured under different conditions, or share no item that the metric counts.
    """
    require_choice("alternative", alternative, ("two-sided", "greater", "less", "worse", "better"))
    require_same_conditions(before, after)
    return _required(find_metric(metric), before, after, alternative)


def compare_records(
    before: Sequence[Record],
    after: Sequence[Record],
    *,
    metrics: Sequence[str] | None = None,
    knows_harm: bool | None = None,
    allow: Collection[str] = (),
) -> list[Change]:
    """Return the paired change of every metric that both sides have, Holm-adjusted as one family.

    Args:
        before, after: One model's records each.
        metrics: The family; None takes every headline rate that the records can give.
        knows_harm: Whether the judge tells harm; None reads it off the records.
        allow: Conditions that may differ: see `CONDITIONS`.

    Raises:
        DataError: The two were measured under different conditions, or share no item.
    """
    require_same_conditions(before, after, allow=allow)
    harm_known = _knows_harm(before) and _knows_harm(after) if knows_harm is None else knows_harm
    family = [metric for metric in metrics or METRICS if metric != "harm_rate" or harm_known]
    changes = [change for metric in family if (change := change_of(find_metric(metric), before, after)) is not None]
    if not changes or (metrics is not None and not set(metrics) & {change.metric for change in changes}):
        raise DataError(
            "The two audits share no item.",
            expected="records of the same items",
            found=f"{len(before)} records before, {len(after)} after, none in common",
            fix="audit both models with the same suite and limit",
        )
    adjusted = holm([change.p_value for change in changes])
    steady = is_comparable(before, after)
    return [
        dataclasses.replace(
            change,
            p_holm=p,
            comparable=steady or change.metric in STAND_ALONE,
            minimum_detectable_change=detectable_in(change, len(changes)),
        )
        for change, p in zip(changes, adjusted, strict=True)
    ]


STAND_ALONE = ("incoherent", "utility")
"""What a shift of the incoherent share leaves readable: that share itself, and the tasks."""


def compare_areas(before: Sequence[Record], after: Sequence[Record], metric: str) -> list[dict[str, Any]]:
    """Return the paired change of one metric per hazard area, explored together.

    The areas are a family of their own, adjusted by Benjamini and Hochberg: `q_value` holds the false discovery rate.

    Args:
        before, after: One model's records each, made under the same conditions.
        metric: Name of the metric.

    Returns:
        The mapping of a change per area that both sides have, with `area` and `q_value`.
    """
    chosen = find_metric(metric)
    sides = by_area(before), by_area(after)
    found = [
        (area, change)
        for area, records in sides[0].items()
        if (change := change_of(chosen, records, sides[1].get(area, []))) is not None
    ]
    adjusted = benjamini_hochberg([change.p_value for _, change in found]) if found else []
    return [
        {"area": area, **change.to_mapping(), "q_value": q} for (area, change), q in zip(found, adjusted, strict=True)
    ]


def is_comparable(before: Sequence[Record], after: Sequence[Record]) -> bool:
    """Whether the share of incoherent answers stayed within ten points, over the items that both sides have."""
    first, second = flags(before, "incoherent"), flags(after, "incoherent")
    shared = first.keys() & second.keys()
    if not shared:
        return True
    return abs(sum(second[one] - first[one] for one in shared)) / len(shared) <= INCOHERENT_SHIFT


CONDITIONS: Mapping[str, Callable[[Record], str]] = {
    "suite": lambda record: record.suite_digest,
    "judge": lambda record: next(iter(record.judgements), "none"),
    "template": lambda record: record.template_digest,
    "token limit": lambda record: str(record.max_new_tokens),
    "k": lambda record: str(record.samples),
    "decoding": lambda record: record.decoding_digest,
    "mitigation": lambda record: record.facts.get("mitigation", "none"),
}
"""What two audits must agree in, by the name that the error uses; `suite` is the digest of the set, `k` the answers
per item."""


def require_same_conditions(before: Sequence[Record], after: Sequence[Record], *, allow: Collection[str] = ()) -> None:
    """Raise `DataError` unless the conditions of both sides agree; the error names what differs.

    Only items that both sides have count: one side may hold a utility task that the other was not asked.

    Args:
        before, after: One model's records each.
        allow: Names of `CONDITIONS` that may differ.

    Raises:
        ConfigError: A name to allow is no condition.
        DataError: A condition differs.
    """
    for name in allow:
        require_choice("allow", name, CONDITIONS)
    shared = {record.item_id for record in before} & {record.item_id for record in after}
    before = [record for record in before if record.item_id in shared]
    after = [record for record in after if record.item_id in shared]
    for name, fingerprint in CONDITIONS.items():
        if name in allow or (name == "decoding" and "token limit" in allow):
            continue
        first, second = _conditions(before, fingerprint), _conditions(after, fingerprint)
        for suite in first.keys() & second.keys():
            # Runs of the first version did not keep the token limit by itself; its digest is compared anyway.
            unknown = name == "token limit" and "None" in first[suite] | second[suite]
            if first[suite] != second[suite] and not unknown:
                raise DataError(
                    f"The two audits differ in '{name}' on the suite '{suite}', so their numbers cannot be compared.",
                    expected=f"{name} {', '.join(sorted(first[suite]))} on both sides",
                    found=f"{', '.join(sorted(second[suite]))} after",
                    fix="audit both models with the same version and settings",
                )
    if "judge" not in allow:
        _require_same_versions(before, after)


def _require_same_versions(before: Sequence[Record], after: Sequence[Record]) -> None:
    """Raise where a judge that both sides have is not the same version, model or prompt, or harm has other judges."""
    harm = [{judge for side in sides for judge in _harm_judge(side)} for sides in (before, after)]
    if harm[0] and harm[1] and harm[0] != harm[1]:
        raise DataError(
            "The two audits differ in the judge of harm, so their numbers cannot be compared.",
            expected=f"{', '.join(sorted(harm[0]))} on both sides",
            found=f"{', '.join(sorted(harm[1]))} after",
            fix="judge both by the same one; records can be judged again without the models",
        )
    versions = [_versions(side) for side in (before, after)]
    for name in versions[0].keys() & versions[1].keys():
        if versions[0][name] != versions[1][name]:
            raise DataError(
                f"The two audits differ in the judge '{name}', so their numbers cannot be compared.",
                expected=f"{', '.join(sorted(versions[0][name]))} on both sides",
                found=f"{', '.join(sorted(versions[1][name]))} after",
                fix="judge both with the same version; records can be judged again without the models",
            )


def _harm_judge(record: Record) -> tuple[str, ...]:
    """Return the judge whose verdict the harm figures read, if the record has one."""
    return tuple(judge for judge in record.judgements if name_of(judge) in HARM_JUDGES)[:1]


def _versions(records: Sequence[Record]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for judge in {judge for record in records for judge in record.judgements}:
        found.setdefault(judge.partition("@")[0], set()).add(judge)
    return found


def _conditions(records: Sequence[Record], fingerprint: Callable[[Record], str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for suite, value in {(record.suite, fingerprint(record)) for record in records}:
        found.setdefault(suite, set()).add(value)
    return found


def _required(metric: Metric, before: Sequence[Record], after: Sequence[Record], alternative: Alternative) -> Change:
    change = change_of(metric, before, after, alternative=alternative)
    if change is None:
        kinds = " or ".join(RULES[metric.name].kinds) if metric.name in RULES else "the right kind"
        raise DataError(
            f"The two audits share no item that '{metric.name}' counts.",
            expected=f"judged items of kind {kinds} on both sides",
            found=f"{len(metric.rows(before))} before, {len(metric.rows(after))} after, none in common",
            fix="audit both models with the same suite and limit",
        )
    return change


def _knows_harm(records: Sequence[Record]) -> bool:
    return any(tells_harm(record) for record in records if record.kind == "harmful")
