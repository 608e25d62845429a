# SPDX-License-Identifier: Apache-2.0
"""A run's records read line by line, as often as needed, without holding them all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from keelwright.core.records import Record, record_from_json
from keelwright.runs.folder import ReadRun, read_run


class RunRecords:
    """The records of one run folder: each iteration reads the file again.

    Of records with the same model, item and sample the newest counts, as when the run is resumed. A last line that was
    cut off by a crash is left out.
    """

    def __init__(self, folder: Path) -> None:
        """Look at the run; nothing but its `run.json` and `summary.json` is kept in memory.

        Raises:
            DataError: It is no run folder, or a record is damaged; the error names the line.
        """
        self.run: ReadRun = read_run(folder)
        self._path = folder / "records.jsonl"
        self._newest: dict[tuple[str, str, int], int] | None = None

    def __iter__(self) -> Iterator[Record]:
        """Yield the records, in the order in which they were made."""
        newest = self._index()
        for number, record in self._lines():
            if newest[record.key] == number:
                yield record

    def models(self) -> dict[str, int]:
        """Return how many records each model has, in order of first appearance."""
        counts: dict[str, int] = {}
        for model, _, _ in self._index():
            counts[model] = counts.get(model, 0) + 1
        return counts

    def _index(self) -> dict[tuple[str, str, int], int]:
        """Return the line of each record that counts: keys only, so that it stays small."""
        if self._newest is None:
            self._newest = {record.key: number for number, record in self._lines()}
        return self._newest

    def _lines(self) -> Iterator[tuple[int, Record]]:
        if not self._path.is_file():
            return
        with self._path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.endswith(b"\n"):
                    yield number, record_from_json(line.decode("utf-8"), where=f"{self._path}:{number}")
