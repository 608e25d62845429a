# SPDX-License-Identifier: Apache-2.0
"""`compare`: the paired change between two runs, from their folders alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keelwright.core.digests import file_digest
from keelwright.heal.reporting import write_report
from keelwright.measure.compare import Change, compare_records
from keelwright.runs.folder import ReadRun, RunFolder, RunSpec, default_run_folder, read_run, unfinished
from keelwright.runs.places import require_place


def compare(run_a: str | Path, run_b: str | Path, *, run: str | Path | None = None) -> dict[str, Any]:
    """Return the paired change B - A per metric, on the items that both runs asked, and keep it as a run with a page.

    Of an audit the audited model is taken, of a `heal` run the repaired one, or the tuned one where nothing was chosen.

    Args:
        run_a: Run folder before.
        run_b: Run folder after.
        run: Folder of the comparison; `runs/<time>-compare` by default.

    Raises:
        DataError: One is no finished run, or items, judge, template or decoding differ.
    """
    before, after = _finished(Path(run_a)), _finished(Path(run_b))
    changes = compare_records(_records(before), _records(after))
    folder = Path(run) if run is not None else default_run_folder("compare")
    summary = {
        "schema": 1,
        "command": "compare",
        "run": str(folder),
        "runs": [str(before.path), str(after.path)],
        "sentence": _sentence(changes),
        "changes": [change.to_mapping() for change in changes],
        "says": [change.sentence for change in changes],
        "utility": (after.summary or {}).get("utility"),
    }
    require_place(folder, flag="--out")
    with RunFolder.open(folder, _spec(before, after), flag="--out") as keeper:
        keeper.finish(summary)
    write_report(folder)
    return summary


def _spec(before: ReadRun, after: ReadRun) -> RunSpec:
    inputs = {
        role: {"ref": str(one.path), "digest": file_digest(one.path / "records.jsonl")}
        for role, one in (("before", before), ("after", after))
    }
    return RunSpec("compare", ("keelwright", "compare", str(before.path), str(after.path)), {}, 0, inputs)


def _sentence(changes: Sequence[Change]) -> str:
    """Return what changed for the worse and for the better, in one sentence."""
    named = {
        verdict: ", ".join(change.metric.replace("_", " ") for change in changes if change.verdict == verdict)
        for verdict in ("regressed", "improved", "not comparable")
    }
    found = [f"{verdict}: {names}" for verdict, names in named.items() if names]
    return f"From the first run to the second, {'; '.join(found)}." if found else "No evidence of any change."


def _finished(folder: Path) -> ReadRun:
    found = read_run(folder)
    if found.summary is None:
        raise unfinished(found)
    return found


def _records(run: ReadRun) -> list[Any]:
    ids = (run.summary or {}).get("model_ids", {})
    wanted = ids.get("repaired") or ids.get("tuned") or "model"
    return [record for record in run.records() if record.model_id == wanted]
