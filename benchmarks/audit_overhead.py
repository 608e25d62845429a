# SPDX-License-Identifier: Apache-2.0
"""What an audit costs beside a bare batched `generate` loop, as a ratio within one run.

The audit is the whole verb on a model in memory: items drawn, answered, judged by the suite's rules, every record
written to a run folder, metrics with their intervals. The bare loop is that of `benchmarks.generation`. Repeats are
interleaved and the ratio is that of each pair, so that a busy machine slows both. Prints one JSON document and exits 1
when the median ratio is above the budget.

    python -m benchmarks.audit_overhead [--repeats 7] [--batch-size 32] [--model lab:workshop/aligned]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.generation import BUDGET, ORGANISM, bare
from keelwright.measure.audit import audit
from keelwright.models.loading import LoadedModel, load
from keelwright.runs.folder import RunFolder, RunSpec
from keelwright.worlds.workshop.suite import WorkshopSuite

SPEC = RunSpec(command="audit", argv=(), config={}, seed=0, inputs={})


def audited(model: LoadedModel, *, batch_size: int) -> int:
    """Audit the model into a run folder; return how many records it holds."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "run"
        with RunFolder.open(path, SPEC) as run:
            result = audit(model, suite="workshop", sink=run, batch_size=batch_size)
            run.finish(result.to_summary())
        return (path / "records.jsonl").read_bytes().count(b"\n")


def main() -> int:
    """Time both, print the comparison, and return the exit code."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--model", default=ORGANISM)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    model, suite = load(chosen.model, dtype=torch.float32, offline=True), WorkshopSuite()
    items = list(suite.items())
    ways = {
        "bare": lambda: bare(model, items, batch_size=chosen.batch_size, new_tokens=suite.max_new_tokens),
        "audit": lambda: audited(model, batch_size=chosen.batch_size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    records = 0
    for repeat in range(chosen.repeats + 1):
        for name, way in ways.items():
            began = time.process_time()
            made = way()
            if repeat:  # The first round warms up.
                seconds[name].append(time.process_time() - began)
            records = made if isinstance(made, int) else records
    ratios = [one / other for one, other in zip(seconds["audit"], seconds["bare"], strict=True)]
    report = {
        "model": model.name,
        "items": len(items),
        "records": records,
        "batch_size": chosen.batch_size,
        "cpu_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "budget": BUDGET,
        "machine": {"platform": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    print(json.dumps(report, indent=2))
    return int(report["ratio"] > BUDGET)


if __name__ == "__main__":
    sys.exit(main())
