# SPDX-License-Identifier: Apache-2.0
"""Records in memory, found by model and item: the sink of audits without a run folder, the index of those with one."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from keelwright.core.records import Record


class RecordIndex:
    """A `RecordSink` in memory; the newest record of a model, item and sample wins."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._records: dict[tuple[str, str, int], Record] = {}
        self._samples: dict[tuple[str, str], list[int]] = {}
        for record in records:
            self._keep(record)

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._records)

    @property
    def records(self) -> list[Record]:
        """Every record, in order of arrival."""
        return list(self._records.values())

    def append(self, record: Record) -> None:
        """Keep a record."""
        self._keep(record)

    def _keep(self, record: Record) -> None:
        if record.key not in self._records:
            self._samples.setdefault(record.key[:2], []).append(record.sample)
        self._records[record.key] = record

    def find(self, model_id: str, item_ids: Collection[str]) -> list[Record]:
        """Return the records of that model and those items, item by item, samples in order."""
        return [
            self._records[model_id, item, sample]
            for item in item_ids
            for sample in sorted(self._samples.get((model_id, item), ()))
        ]
