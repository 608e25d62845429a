# SPDX-License-Identifier: Apache-2.0
"""`compare`: the paired change between two runs or logs, from their files alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from keelwright.core.errors import DataError
from keelwright.heal.reporting import write_report
from keelwright.heal.sides import Side, read_side
from keelwright.measure.compare import Change, compare_areas, compare_records
from keelwright.runs.folder import RunFolder, RunSpec, default_run_folder
from keelwright.runs.interop.compare_logs import compare_logs
from keelwright.runs.places import require_place


def compare(
    run_a: str | Path,
    run_b: str | Path,
    *,
    run: str | Path | None = None,
    metrics: Sequence[str] = (),
    allow: Collection[str] = (),
    scorer: str | None = None,
) -> dict[str, Any]:
    """Return the paired change B - A per metric, on the items that both runs asked, and keep it as a run with a page.

    Of an audit the audited model is taken, of a `heal` run the repaired one, or the tuned one where nothing was chosen.

    Args:
        run_a: Run folder before; or a log of Inspect or lm-eval.
        run_b: Run folder after, or a log.
        run: Folder of the comparison; `runs/<time>-compare` by default.
        metrics: What to compare; none: what both sides name.
        allow: Conditions that may differ, see `measure.compare.CONDITIONS`.
        scorer: Of logs: the scorer that decides.

    Raises:
        DataError: One is no finished run, or items, judge, template or decoding differ.
    """
    before, after = read_side(Path(run_a), scorer=scorer), read_side(Path(run_b), scorer=scorer)
    allowed = {*allow, *before.allowed, *after.allowed}
    changes = _changes(before, after, metrics, allow=allow)
    folder = Path(run) if run is not None else default_run_folder("compare")
    primary = changes[0].metric
    summary = {
        "schema": 1,
        "command": "compare",
        "run": str(folder),
        "runs": [before.name, after.name],
        "sentence": _sentence(changes),
        "primary": primary,
        "changes": [change.to_mapping() for change in changes],
        "family": f"{len(changes)} metrics, p adjusted by Holm",
        "area_changes": [] if before.log else compare_areas(before.records, after.records, primary),
        "allowed": sorted(allowed),
        "says": [*(change.sentence for change in changes), *notes_of(before, after)],
        "utility": after.utility,
    }
    require_place(folder, flag="--out")
    with RunFolder.open(folder, _spec(before, after, metrics, allow), flag="--out") as keeper:
        keeper.finish(summary)
    write_report(folder)
    return summary


def _changes(before: Side, after: Side, metrics: Sequence[str], *, allow: Collection[str]) -> list[Change]:
    if before.log is not None and after.log is not None:
        return compare_logs(before.log, after.log, scorers=metrics or None, allow=allow)
    if before.log is not None or after.log is not None:
        log = before if before.log is not None else after
        raise DataError(
            "A run and a log of another program cannot be compared.",
            expected="two runs, or two logs",
            found=f"one log, '{log.name}'",
            fix="export the run with `keelwright runs export RUN --to inspect --out FILE.eval` and compare the logs",
        )
    family = tuple(metrics) or tuple(name for name in after.metrics if name in before.metrics)
    return compare_records(before.records, after.records, metrics=family or None, allow=allow)


def notes_of(*sides: Side) -> list[str]:
    """Return what the readers of logs noted, each with its file."""
    return [f"{side.name}: {note}" for side in sides if side.log is not None for note in side.log.notes]


def _spec(before: Side, after: Side, metrics: Sequence[str], allow: Collection[str]) -> RunSpec:
    inputs = {role: {"ref": one.name, "digest": one.digest} for role, one in (("before", before), ("after", after))}
    words = ["keelwright", "compare", before.name, after.name]
    words += [word for name in metrics for word in ("--metric", name)]
    words += [word for name in sorted(allow) for word in ("--allow", name)]
    return RunSpec("compare", tuple(words), {"metrics": list(metrics), "allow": sorted(allow)}, 0, inputs)


def _sentence(changes: Sequence[Change]) -> str:
    """Return what changed for the worse and for the better, in one sentence."""
    named = {
        verdict: ", ".join(change.metric.replace("_", " ") for change in changes if change.verdict == verdict)
        for verdict in ("regressed", "improved", "not comparable")
    }
    found = [f"{verdict}: {names}" for verdict, names in named.items() if names]
    return f"From the first run to the second, {'; '.join(found)}." if found else "No evidence of any change."
