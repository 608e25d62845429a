# SPDX-License-Identifier: Apache-2.0
"""The verified choice, written once: a run that was killed right after writing accepts what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keelwright.core.catalogue import find_method
from keelwright.core.protocols import Progress, TensorSource
from keelwright.heal.candidates import Candidate
from keelwright.heal.decide import Trial
from keelwright.heal.job import Job
from keelwright.models.folders import ADAPTER_WEIGHTS, read_json
from keelwright.repair.build import coefficients_of
from keelwright.repair.materialise import Output, materialise_edit
from keelwright.runs.folder import RunFolder
from keelwright.weights.lock import LOCK_FILE, verify

_NOTE = "written"


def write_choice(
    job: Job,
    run: RunFolder,
    chosen: Trial,
    candidate: Candidate,
    sources: Mapping[str, TensorSource],
    *,
    results: Mapping[str, Mapping[str, Any]],
    progress: Progress,
) -> dict[str, Any]:
    """Write the repaired model to `job.out`, unless this very run has done so before it was cut off.

    Args:
        job: What the run works on.
        run: Its folder, which remembers what was written.
        chosen: The verified trial.
        candidate: Its method.
        sources: Tensors by role.
        results: Verified figures by role, for the model card.
        progress: Told about every tensor.

    Returns:
        What `materialise_edit` returns.
    """
    known = run.recall(_NOTE)
    if known is not None and (job.out / LOCK_FILE).is_file():
        return dict(known)
    edit = candidate.build(chosen.coefficient)
    written = _left_by_a_kill(job, chosen, coefficients_of(edit))
    if written is None:
        written = materialise_edit(
            find_method(chosen.method),
            edit,
            sources,
            job.tuned.local or job.tuned.ref.live,
            Output(job.out, max_shard_bytes=int(job.config.max_shard_gb * 1e9)),
            results=results,
            folders={party.role: party.local.folder for party in job.parties if party.local is not None},
            progress=progress,
        )
    run.remember(_NOTE, written)
    return written


def _left_by_a_kill(job: Job, chosen: Trial, coefficients: Mapping[str, float]) -> dict[str, Any] | None:
    """Return what stands in `job.out` when it is this choice, whole: the kill fell between writing and noting it.

    Anything else that stands there is left to the writer to refuse.
    """
    if not (job.out / LOCK_FILE).is_file():
        return None
    lock = read_json(job.out / LOCK_FILE, str(job.out))
    found = {role: source.get("digest") for role, source in lock.get("sources", {}).items()}
    ours = {party.role: party.digest for party in job.parties if party.role in found}
    same = lock.get("method") == chosen.method and lock.get("coefficients") == coefficients
    if not same or not ours or any(found[role] != digest for role, digest in ours.items()):
        return None
    verify(job.out)
    return {
        "schema": 1,
        "command": "repair",
        "method": chosen.method,
        "coefficients": dict(coefficients),
        "out": str(job.out),
        "form": "adapter" if (Path(job.out) / ADAPTER_WEIGHTS).is_file() else "full",
        **{name: lock[name] for name in ("files", "tensors", "bytes")},
        "seconds": round(lock["seconds"], 3),
    }
