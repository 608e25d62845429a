# SPDX-License-Identifier: Apache-2.0
"""Measures live models, between training steps, under one protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from keelwright.arena.protocol import MeasuringProtocol, protocol_of
from keelwright.core.digests import json_digest
from keelwright.core.protocols import Progress, RecordSink
from keelwright.core.records import Record
from keelwright.data.asking import PLAIN, Asking
from keelwright.measure.audit import Examination, Examined
from keelwright.measure.part import Part
from keelwright.measure.utility import TextUtility, Utility, WindowLosses
from keelwright.models.chat import template_digest
from keelwright.models.engines.asked import asked
from keelwright.models.engines.local import LocalEngine
from keelwright.models.loading import LoadedModel


@dataclass
class Meter:
    """What every model of a run is measured with."""

    parts: Sequence[Part]
    utility: Utility | None
    sink: RecordSink
    progress: Progress
    limit: int | None = None
    seed: int = 0
    _reference: WindowLosses | None = field(default=None, init=False)
    """Of the model before any training, where the utility is a text."""

    def protocol(self, model: LoadedModel, asking: Asking = PLAIN) -> MeasuringProtocol:
        """Return what a measurement of the model in a frame is made under."""
        return protocol_of(
            self.parts, template=template_digest(model.tokenizer), asking=asking_id(asking), utility=self.utility
        )

    def examine(self, model: LoadedModel, model_id: str, *, asking: Asking = PLAIN, revision: str = "") -> Examined:
        """Return a model's records and metrics; what the sink has already is not asked again.

        Args:
            model: The live model. The first one that is measured is what a text's perplexity is held against.
            model_id: Of its records.
            asking: The frame around each request.
            revision: What the weights are, since they are in no file: digest of how they came about.
        """
        named = dataclasses.replace(model, revision=revision) if revision else model
        bench = Examination(tuple(self.parts), self.utility, self.sink, self.limit, self.seed, 0, _Quiet(self.progress))
        found, losses = bench.examine(model_id, asked(LocalEngine(named), asking), self._reference)
        if isinstance(self.utility, TextUtility) and self._reference is None:
            self._reference = losses
        return found


def asking_id(asking: Asking) -> str:
    """Return a frame's name with the digest of its words; `plain` for none."""
    if asking.name == PLAIN.name:
        return PLAIN.name
    return f"{asking.name} {json_digest(list(asking.ask('request', None)))[:12]}"


def records_by_item(records: Sequence[Record]) -> dict[str, Record]:
    """Return the first answer of each item."""
    return {record.item_id: record for record in records if record.sample == 0}


class _Quiet:
    """Passes notes on and draws no stages: whoever trains counts steps, not the answers in between."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def plan(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Do nothing."""

    def stage(self, title: str, total: int | None = None, unit: str = "") -> None:
        """Do nothing."""

    def advance(self, count: int = 1) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Say it."""
        self._progress.note(text)

    def result(self, text: str) -> None:
        """Do nothing."""
