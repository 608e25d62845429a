# SPDX-License-Identifier: Apache-2.0
"""What `compare` of two large runs costs: CPU seconds and peak memory of a process of its own.

Two run folders of 100,000 records each are written, with prompts and answers of ordinary length; then `keelwright
compare` runs in a child process, once with items that stand alone and once with items in clusters of four. Prints one
JSON document and exits 1 when a limit is passed.

    python -m benchmarks.compare_large [--records 100000] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from keelwright.core.records import Judgement, Record
from keelwright.runs.folder import RunFolder, RunSpec

CPU_SECONDS = 10.0
MEMORY_MB = 500.0
PER_CLUSTER = 4

_WORDS = ("the", "boat", "left", "a", "harbour", "at", "noon", "and", "no", "one", "saw", "where", "it", "went")


def records(count: int, *, refused: float, clustered: bool) -> Iterator[Record]:
    """Yield one model's records: harmful, contrast and ordinary items in turn, of which a share is refused."""
    draw = random.Random(refused)
    for index in range(count):
        kind = ("harmful", "contrast", "benign")[index % 3]
        share = {"harmful": refused, "contrast": 0.1, "benign": 0.01}[kind]
        label = "refusal_full" if draw.random() < share else "safe_completion"
        label = "incoherent" if draw.random() < 0.01 else label
        yield Record(
            item_id=f"large/{index:06d}",
            suite="large",
            suite_digest="large",
            kind=kind,
            hazard=f"area-{index % 11}",
            prompt=" ".join(draw.choices(_WORDS, k=24)),
            model_id="model",
            revision="none",
            template_digest="none",
            decoding_digest="none",
            output=" ".join(draw.choices(_WORDS, k=60)),
            n_tokens=60,
            finish="eos",
            judgements={"refusal-lists@1": Judgement(label, None, "rule")},
            cluster_id=f"large/{index // (3 * PER_CLUSTER)}" if clustered else None,
            max_new_tokens=128,
            n_prompt_tokens=24,
        )


def write_run(path: Path, count: int, *, refused: float, clustered: bool) -> None:
    """Write a finished audit of that many records."""
    with RunFolder.open(path, RunSpec("audit", (), {}, 0, {})) as run:
        for record in records(count, refused=refused, clustered=clustered):
            run.append(record)
        run.finish({"schema": 1, "command": "audit", "primary": "refusal_rate", "metrics": {}})


def measured(folder: Path) -> dict[str, float]:
    """Run `keelwright compare a b` in the folder; return its CPU seconds, wall seconds and peak memory."""
    line = [sys.executable, "-m", "benchmarks.compare_large", "--child", str(folder)]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": cpu, "wall_seconds": time.perf_counter() - start, "peak_mb": float(done.stdout)}


def child(folder: Path) -> None:
    """Do what the command does, in this process, and print its peak memory in megabytes."""
    import contextlib
    import io

    from typer.testing import CliRunner

    from keelwright.cli.app import app

    with contextlib.redirect_stdout(io.StringIO()):
        words = ["compare", str(folder / "a"), str(folder / "b"), "--out", str(folder / "change"), "--json"]
        done = CliRunner().invoke(app, words, catch_exceptions=False)
    if done.exit_code:
        sys.exit(done.output)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(kilobytes / (1e6 if platform.system() == "Darwin" else 1e3))


def main() -> int:
    """Write the runs, measure both comparisons, and return the exit code."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--records", type=int, default=100_000)
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--keep", type=Path, help="write the runs here and leave them")
    chosen = options.parse_args()
    if chosen.child is not None:
        child(chosen.child)
        return 0
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for name, clustered in (("single", False), ("clustered", True)):
            folder = (chosen.keep or Path(place)) / name
            for side, refused in (("a", 0.92), ("b", 0.90)):
                write_run(folder / side, chosen.records, refused=refused, clustered=clustered)
            found[name] = measured(folder)
    within = all(one["cpu_seconds"] < CPU_SECONDS and one["peak_mb"] < MEMORY_MB for one in found.values())
    limits = {"cpu_seconds": CPU_SECONDS, "peak_mb": MEMORY_MB}
    print(json.dumps({"records_per_side": chosen.records, **found, "limits": limits, "within": within}, indent=2))
    return int(not within)


if __name__ == "__main__":
    sys.exit(main())
