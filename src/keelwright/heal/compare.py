# SPDX-License-Identifier: Apache-2.0
"""`compare`: the paired change between two runs, from their folders alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keelwright.measure.compare import compare_records
from keelwright.runs.folder import ReadRun, read_run, unfinished


def compare(run_a: str | Path, run_b: str | Path) -> dict[str, Any]:
    """Return the paired change B - A per metric, on the items that both runs asked.

    Of an audit the audited model is taken, of a `heal` run the repaired one, or the tuned one where nothing was chosen.

    Args:
        run_a: Run folder before.
        run_b: Run folder after.

    Raises:
        DataError: One is no finished run, or items, judge, template or decoding differ.
    """
    before, after = _finished(Path(run_a)), _finished(Path(run_b))
    changes = compare_records(_records(before), _records(after))
    return {
        "schema": 1,
        "command": "compare",
        "runs": [str(before.path), str(after.path)],
        "changes": [change.to_mapping() for change in changes],
        "says": [change.sentence for change in changes],
    }


def _finished(folder: Path) -> ReadRun:
    found = read_run(folder)
    if found.summary is None:
        raise unfinished(found)
    return found


def _records(run: ReadRun) -> list[Any]:
    ids = (run.summary or {}).get("model_ids", {})
    wanted = ids.get("repaired") or ids.get("tuned") or "model"
    return [record for record in run.records() if record.model_id == wanted]
