# SPDX-License-Identifier: Apache-2.0
"""One metric per hazard area and model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keelwright.core.records import Record
from keelwright.measure.metric_table import find_metric


def areas_of(records_by_role: Mapping[str, Sequence[Record]], metric: str) -> list[dict[str, Any]]:
    """Return one metric per hazard area and model.

    Args:
        records_by_role: Records of each model, by role (`aligned`, `tuned`, ...).
        metric: Name of the metric.

    Returns:
        One mapping per area that any model has judged items in, in order of first appearance: `area`, and per role an
        estimate as a mapping, or None.

    Raises:
        ConfigError: There is no such metric.
    """
    chosen = find_metric(metric)
    by_role = {role: by_area(records) for role, records in records_by_role.items()}
    areas = dict.fromkeys(area for found in by_role.values() for area in found)
    rows: list[dict[str, Any]] = []
    for area in areas:
        estimates = {role: chosen.estimate(found.get(area, [])) for role, found in by_role.items()}
        if any(one is not None for one in estimates.values()):
            plain = {role: None if one is None else one.to_mapping() for role, one in estimates.items()}
            rows.append({"area": area, **plain})
    return rows


def by_area(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records of each hazard area, areas in order of first appearance."""
    areas: dict[str, list[Record]] = {}
    for record in records:
        areas.setdefault(record.hazard, []).append(record)
    return areas
