# SPDX-License-Identifier: Apache-2.0
"""What a method found out about tensors while it was applied: one row per tensor, summed up for the lock file.

An edit may offer `facts(found)`, which returns numbers by name from what its reductions of one tensor came to: a
cosine, a ratio, `fell_back` where a formula had no answer and another one stood in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keelwright.core.protocols import Found, WeightEdit

Facts = list[tuple[int, str, dict[str, float]]]
"""Rows of the number of the output, the tensor, and its facts."""

FELL_BACK = "fell_back"
"""The fact that is more than 0 where a method took another formula than its own."""


def offers_facts(edit: WeightEdit) -> bool:
    """Return whether an edit, or a part of it, has facts to tell."""
    parts = getattr(edit, "parts", ())
    inner = getattr(edit, "inner", None)
    return hasattr(edit, "facts") or any(offers_facts(one.edit) for one in parts) or bool(inner and offers_facts(inner))


def facts_of(edit: WeightEdit, name: str, found: Found) -> dict[str, float]:
    """Return what is worth knowing of a tensor; empty where the edit says nothing.

    Args:
        edit: The edit; of one made of several, the part that makes the tensor is asked.
        name: The tensor.
        found: What its reductions came to.
    """
    own: Callable[[str], WeightEdit] | None = getattr(edit, "edit_of", None)
    if own is not None:
        return facts_of(own(name), name, found)
    told: Callable[[Found], Mapping[str, float]] | None = getattr(edit, "facts", None)
    return dict(told(found)) if told is not None and found else {}


def collector(edits: Sequence[WeightEdit], name: str, into: Facts) -> Callable[[Sequence[Found]], None] | None:
    """Return what takes the reductions of one tensor and adds their facts to `into`; None where none are offered."""
    telling = [number for number, edit in enumerate(edits) if offers_facts(edit)]
    if not telling:
        return None

    def take(found: Sequence[Found]) -> None:
        for number in telling:
            facts = facts_of(edits[number], name, found[number])
            if facts:
                into.append((number, name, facts))

    return take


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Return mean, least, largest, number of tensors and share of those not 0, by name of the fact.

    Args:
        rows: The facts of each tensor. What is not finite counts as a tensor, and in no mean.

    >>> summary([{"cosine": 0.5}, {"cosine": 1.0}])["cosine"]["mean"]
    0.75
    """
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(float(value))
    result = {}
    for name, values in sorted(columns.items()):
        finite = [value for value in values if math.isfinite(value)]
        result[name] = {
            "mean": math.fsum(finite) / len(finite) if finite else None,
            "min": min(finite, default=None),
            "max": max(finite, default=None),
            "tensors": len(values),
            "share_nonzero": sum(value != 0.0 for value in values) / len(values),
        }
    return result


def notes_on(rows: Sequence[Mapping[str, float]], method: str) -> tuple[str, ...]:
    """Return the line that a person should read: on how many tensors the method fell back to linear interpolation."""
    asked = [row[FELL_BACK] for row in rows if FELL_BACK in row]
    fallen = sum(one > 0.0 for one in asked)
    return (f"{method} fell back to linear on {fallen} of {len(asked)} tensors",) if fallen else ()
