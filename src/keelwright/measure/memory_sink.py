# SPDX-License-Identifier: Apache-2.0
"""Records kept in memory: for audits from Python that need no run folder."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from keelwright.core.records import Record


class ListSink:
    """A `RecordSink` in memory; the newest record of a model and item wins."""

    def __init__(self, records: Sequence[Record] = ()) -> None:
        self._records = {record.key: record for record in records}

    @property
    def records(self) -> list[Record]:
        """Every record, in order of arrival."""
        return list(self._records.values())

    def append(self, record: Record) -> None:
        """Keep a record."""
        self._records[record.key] = record

    def find(self, model_id: str, item_ids: Collection[str]) -> list[Record]:
        """Return the records of that model and those items."""
        return [self._records[key] for item in item_ids if (key := (model_id, item)) in self._records]
