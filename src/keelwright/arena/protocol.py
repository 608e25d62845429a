# SPDX-License-Identifier: Apache-2.0
"""What a figure was measured under, and the rows of a table: two rows are compared only where that is the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keelwright.core.digests import json_digest
from keelwright.core.errors import DataError
from keelwright.measure.part import Part
from keelwright.measure.utility import Utility, utility_digest


@dataclass(frozen=True, slots=True)
class MeasuringProtocol:
    """How a model was asked and judged."""

    suite: str
    suite_digest: str
    """Of the items that are asked, with their words."""
    items: int
    """Asked of one model, the task's left out."""
    judge: str
    """Digest of the judges: their names and settings."""
    template: str
    """Digest of the chat template."""
    asking: str
    """Name and digest of the frame around each request; `plain` for none."""
    decoding: str
    utility: str
    """What stands beside safety; `none`."""

    @property
    def hash(self) -> str:
        """Digest of all of it."""
        return json_digest(dataclasses.asdict(self))

    def to_mapping(self) -> dict[str, Any]:
        """Return the protocol as plain values, its hash included."""
        return {"hash": self.hash, **dataclasses.asdict(self)}


def protocol_of(parts: Sequence[Part], *, template: str, asking: str, utility: Utility | None) -> MeasuringProtocol:
    """Return the protocol of a measurement.

    Args:
        parts: What is asked, by whom it is judged.
        template: Digest of the chat template.
        asking: Name and digest of the frame.
        utility: What stands beside safety.
    """
    return MeasuringProtocol(
        suite=" + ".join(part.name for part in parts),
        suite_digest=json_digest([[item.item_id, item.prompt, item.system] for part in parts for item in part.items]),
        items=sum(len(part.items) for part in parts),
        judge=json_digest([judge.judge_id for part in parts for judge in part.judges]),
        template=template,
        asking=asking,
        decoding=json_digest([dataclasses.asdict(_without_batch(part)) for part in parts]),
        utility="none" if utility is None else f"{utility.name} {utility_digest(utility)[:12]}",
    )


def _without_batch(part: Part) -> Any:
    return dataclasses.replace(part.decoding, batch_size=1)


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One model at one step of one arm, measured."""

    arm: str
    """`start`, `undefended`, a defence's name, `more alignment`, `positive control`, ..."""
    stress: str
    """Name of the stress; `none` where nothing was tuned."""
    stage: str
    """Of the stress; `start` before it."""
    step: int
    """Optimiser steps of the stage."""
    seed: int
    rows: int
    """Rows of the stage."""
    harmful_rows: int | None
    """Those of them that answer a harmful request; None: not known, as of a user's own file."""
    lr: float | None
    metrics: Mapping[str, Any]
    """By name: value, low, high, n; None where it was not measured."""
    protocol: MeasuringProtocol
    model_id: str = ""
    """Of its records in the run."""
    label: str = ""
    """The arm with the settings that were given."""
    conditions: str = ""
    """Digest of model, stress and tuning: arms that share it may be compared."""
    settings: str = ""
    """Digest of the defence's settings and training."""

    def to_mapping(self) -> dict[str, Any]:
        """Return the row as plain values, with protocol hash, template and judge."""
        plain = {name: getattr(self, name) for name in self.__slots__ if name != "protocol"}
        protocol = self.protocol
        return {
            **plain,
            "metrics": dict(self.metrics),
            "protocol": protocol.hash,
            "template": protocol.template,
            "judge": protocol.judge,
            "asking": protocol.asking,
        }


def require_comparable(protocols: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `DataError` unless all protocols are one.

    Args:
        protocols: By what the user calls it (a run's folder): the protocol as `to_mapping` gives it.

    Raises:
        DataError: Two differ; the first condition that differs is named.
    """
    names = list(protocols)
    for other in names[1:]:
        first, second = protocols[names[0]], protocols[other]
        differing = [key for key in first if key != "hash" and first[key] != second.get(key)]
        if differing:
            key = differing[0]
            raise DataError(
                f"'{names[0]}' and '{other}' were measured under different protocols: {', '.join(differing)}.",
                expected=f"{key} {first[key]}",
                found=f"{key} {second.get(key)}",
                fix="measure both with the same suite, judge, template, frame and decoding",
            )
