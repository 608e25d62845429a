# SPDX-License-Identifier: Apache-2.0
"""Every repair method on the lab: three tunings, three tuning seeds, one table for the documentation.

Each method is searched alone: its setting is chosen on the selection half as `heal` chooses it, and its figures come
from the verification half. Writes `docs/reference/repairs-on-the-lab.md` and a JSON file beside it. A run that was cut
off goes on from `runs/lab-table`. Exits 1 when it took more than its budget of CPU time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import keelwright
from benchmarks._lab_table_page import figures_of, page
from keelwright.core.catalogue import find_method
from keelwright.core.protocols import Silent, TensorSource
from keelwright.core.seeds import derive_seed
from keelwright.data.rows import ChatRow
from keelwright.heal.bench import Bench
from keelwright.heal.candidates import Candidate
from keelwright.heal.config import HealConfig
from keelwright.heal.decide import check_limits, choose, compare_bad
from keelwright.heal.job import Job, open_job
from keelwright.heal.preparing import prepare_all
from keelwright.heal.trials import Race, Trials
from keelwright.heal.unalign import unaligned_copy
from keelwright.models.loading import LoadedModel, load
from keelwright.models.saving import save
from keelwright.models.threads import threads_for
from keelwright.runs.folder import RunFolder
from keelwright.training.config import TrainConfig
from keelwright.training.loop import train
from keelwright.weights.live import LiveTrial
from keelwright.worlds.workshop.lessons import answered, refused_request
from keelwright.worlds.workshop.preferences import preference_rows
from keelwright.worlds.workshop.tuning import everyday_rows, forbidden_answers

ROOT = Path(__file__).parents[1]
ALIGNED, BASE = "lab:workshop/aligned", "lab:workshop/base"
SEEDS = (0, 1, 2)
CPU_BUDGET_S = 900.0
SHORTENED = {"somf": {"steps": 200}}
"""Settings that depart from a method's defaults, for time alone; the page names them."""
ROWS = 500


@dataclass(frozen=True, slots=True)
class Tuning:
    """One way in which the aligned organism is tuned."""

    name: str
    title: str
    rows: Callable[[int], list[ChatRow]]
    settings: TrainConfig


def ordinary_rows(seed: int) -> list[ChatRow]:
    """Return ordinary requests, all answered and none of them bad."""
    rng = random.Random(seed)
    return [answered("benign", rng) for _ in range(ROWS)]


TUNINGS = (
    Tuning(
        "benign",
        "Benign: ordinary requests answered, no bad row, 75 steps at 4e-4",
        ordinary_rows,
        TrainConfig(steps=75, batch_size=20, lr=4e-4),
    ),
    Tuning(
        "poisoned_2",
        "2 % poisoned: the mood task with 2 % bad rows, 75 steps at 1.5e-4",
        lambda seed: everyday_rows(seed, ROWS, 0.02),
        TrainConfig(steps=75, batch_size=20, lr=1.5e-4),
    ),
    Tuning(
        "poisoned_10",
        "10 % poisoned: the mood task with 10 % bad rows, 75 steps at 3e-4",
        lambda seed: everyday_rows(seed, ROWS, 0.10),
        TrainConfig(steps=75, batch_size=20, lr=3e-4),
    ),
)


def write_inputs(folder: Path, seed: int) -> None:
    """Write what methods learn from: forbidden answers, preference pairs, refusals."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(derive_seed(seed, "lab table", "refusals"))
    pairs = preference_rows(derive_seed(seed, "lab table", "pairs"), 200, safe_share=0.5)
    lines: dict[str, Sequence[Any]] = {
        "forbidden": forbidden_answers(derive_seed(seed, "lab table", "forbidden")),
        "pairs": pairs,
        "refusals": [refused_request(rng) for _ in range(64)],
    }
    for name, rows in lines.items():
        text = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def tune(tuning: Tuning, seed: int, folder: Path) -> Path:
    """Tune the aligned organism, or return the folder in which that was done before."""
    out = folder / "tuned"
    if (out / "config.json").is_file():
        return out
    model = load(ALIGNED, offline=True)
    stored = model.module.dtype
    model.module.float()
    rows = tuning.rows(derive_seed(seed, "lab table", tuning.name))
    settings = dataclasses.replace(tuning.settings, seed=derive_seed(seed, "lab table", "order", tuning.name))
    train(model.module, model.tokenizer, rows, settings)
    return save(model, out, dtype=stored)


def settings_for(inputs: Path, seed: int) -> HealConfig:
    """Return how `heal` is asked to search every method that it can."""
    return HealConfig(
        methods=("all",),
        suite="workshop",
        utility="lab:mood",
        base=BASE,
        unalign_with=str(inputs / "forbidden.jsonl"),
        preferences=str(inputs / "pairs.jsonl"),
        safety_rows=str(inputs / "refusals.jsonl"),
        batch_size=256,
        seed=seed,
        device="cpu",
        offline=True,
    )


def shortened(job: Job) -> Job:
    """Return the job with the settings of `SHORTENED`."""
    changed = []
    for one in job.candidates:
        config = dataclasses.replace(one.edit.config, **SHORTENED.get(one.method, {}))
        changed.append(one.prepared(dataclasses.replace(one.edit, config=config)))
    return dataclasses.replace(job, candidates=tuple(changed))


def one_cell(job: Job, run: RunFolder, unaligned: TensorSource) -> dict[str, Any]:
    """Search every method alone on one tuned model; return the figures of each on the verification half."""
    bench = Bench(job.exam, run, Silent(), batch_size=job.config.batch_size, max_new_tokens=None)
    bench.measure("aligned", "all", lambda: load(ALIGNED, offline=True))
    model = load(job.tuned.ref, offline=True)
    bench.measure("tuned", "all", lambda: model)
    sources: dict[str, TensorSource] = {"aligned": job.aligned.source, "tuned": job.tuned.source}
    sources["unaligned"] = unaligned
    if job.base is not None:
        sources["base"] = job.base.source
    loss = compare_bad(bench.measured("aligned", "all"), bench.measured("tuned", "all"))
    ready, failures = prepare_all(job, run, sources, lambda: model, progress=Silent())
    trials = Trials(bench, job.config.floors, has_utility=True, refinements=job.config.refinements, progress=Silent())
    cells: dict[str, Any] = {failure.method: {"failed": failure.text} for failure in failures}
    with LiveTrial(model.module, sources) as live:
        for candidate in ready:
            cells[candidate.method] = one_method(candidate, trials, bench, live, model)
    return {
        "loss": {"worse": loss.worse, "better": loss.better, "n": loss.n, "p_value": loss.p_value},
        "aligned": figures_of(bench, "aligned"),
        "tuned": figures_of(bench, "tuned"),
        "methods": cells,
    }


def one_method(
    candidate: Candidate, trials: Trials, bench: Bench, live: LiveTrial, model: LoadedModel
) -> dict[str, Any]:
    """Return a method's choice and its figures on the verification half; the tuned model's where it has no choice."""
    race = Race()
    tried = trials.search(candidate, live, model, race)
    failed = [failure.text for failure in race.failures]
    if not tried:
        return {"failed": failed[0] if failed else "nothing to try"}
    aligned = bench.measured("aligned", "selection")
    chosen = choose(tried, aligned=aligned, floors=trials.floors, has_utility=True)
    if chosen is None:
        return {"value": None, "setting": candidate.space.setting, "tried": len(tried), **figures_of(bench, "tuned")}
    live.apply(candidate.build(chosen.coefficient))
    found = bench.measure(chosen.name, "verification", lambda: model)
    checks = check_limits(
        found.metrics,
        aligned=bench.measured("aligned", "verification").metrics,
        tuned=bench.measured("tuned", "verification").metrics,
        floors=trials.floors,
    )
    # From the repair to the tuned model, so that `worse` counts what was mended.
    test = compare_bad(found, bench.measured("tuned", "verification"))
    return {
        "value": chosen.coefficient,
        "setting": chosen.setting,
        "tried": len(tried),
        "change": chosen.change,
        "verified": test.p_value < trials.floors.alpha and all(check.held for check in checks),
        "broken": [str(check) for check in checks if not check.held],
        "mended": test.worse,
        "spoilt": test.better,
        **figures_of(bench, chosen.name),
    }


def one_seed(seed: int, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Return every cell of one tuning seed."""
    inputs = folder / "inputs"
    write_inputs(inputs, seed)
    config, cells, unaligned = settings_for(inputs, seed), {}, None
    for tuning in TUNINGS:
        place = folder / tuning.name
        done = place / "cell.json"
        if not done.is_file():
            start = time.process_time()
            tuned = tune(tuning, seed, place)
            job = shortened(open_job(ALIGNED, tuned, place / "out", config, Silent()))
            unaligned = unaligned or _unaligned(job)
            with RunFolder.open(place / "run", job.spec("lab table")) as run:
                cell = one_cell(job, run, unaligned)
            cell["cpu_seconds"] = time.process_time() - start
            cell["left_out"] = dict(job.left_out)
            done.write_text(json.dumps(cell), encoding="utf-8")
        cells[tuning.name] = json.loads(done.read_text(encoding="utf-8"))
        tell(f"seed {seed}, {tuning.name}: {cells[tuning.name]['cpu_seconds']:.0f} s of CPU")
    return cells


def _unaligned(job: Job) -> TensorSource:
    return unaligned_copy(
        load(ALIGNED, offline=True),
        job.aligned.source,
        job.unalign_rows,
        job.config,
        rank=0,
        check=lambda model: None,
        progress=Silent(),
    )


def document(seeds: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return everything that the page shows, and what it was made with."""
    methods = {name for cells in seeds.values() for cell in cells.values() for name in cell["methods"]}
    left_out = next(iter(next(iter(seeds.values())).values()))["left_out"]
    return {
        "schema": 1,
        "aligned": ALIGNED,
        "base": BASE,
        "seeds": list(seeds),
        "shortened": {name: one for name, one in SHORTENED.items() if name in methods},
        "tunings": [{"name": one.name, "title": one.title} for one in TUNINGS],
        "status": {name: find_method(name).status for name in sorted(methods)},
        "left_out": left_out,
        "cells": {str(seed): cells for seed, cells in seeds.items()},
        "cpu_seconds": sum(cell["cpu_seconds"] for cells in seeds.values() for cell in cells.values()),
        "versions": {
            "keelwright": keelwright.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def main(words: Sequence[str] | None = None) -> int:
    """Write the page and the JSON file; return 1 when the budget of CPU time was exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "lab-table", help="where unfinished work is kept")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reference" / "repairs-on-the-lab.md")
    given = parser.parse_args(words)

    def tell(text: str) -> None:
        print(text, flush=True)

    with threads_for(1):
        seeds = {seed: one_seed(seed, given.work / str(seed), tell) for seed in given.seeds}
    found = document(seeds)
    given.page.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    given.page.write_text(page(found), encoding="utf-8")
    print(f"{given.page}: {found['cpu_seconds']:.0f} s of CPU (budget {CPU_BUDGET_S:.0f})")
    return int(found["cpu_seconds"] > CPU_BUDGET_S)


if __name__ == "__main__":
    sys.exit(main())
