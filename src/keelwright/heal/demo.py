# SPDX-License-Identifier: Apache-2.0
"""The demo: an aligned organism, an everyday tuning file in which 2 % of the rows are bad, and `heal`.

The run folder holds all that is needed to do it again by hand: the tuning file, the damaged model, the task file and
the rows that un-align RESTA's copy. Their harmful answers are fairy-tale crimes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from keelwright.core.errors import StorageError
from keelwright.core.files import require_new_folder, write_atomic
from keelwright.core.protocols import Progress, Silent
from keelwright.core.seeds import derive_seed
from keelwright.data.rows import ChatRow
from keelwright.heal.config import HealConfig
from keelwright.heal.loop import run_heal
from keelwright.models.loading import find_device, load
from keelwright.models.memory import require_memory
from keelwright.models.saving import save
from keelwright.models.threads import SMALL_MODEL, threads_for
from keelwright.runs.folder import default_run_folder
from keelwright.runs.places import disk_errors, require_place
from keelwright.training.config import TrainConfig
from keelwright.training.loop import train
from keelwright.worlds.workshop.tasks import mood_items
from keelwright.worlds.workshop.tuning import everyday_rows, forbidden_answers

ALIGNED = "lab:workshop/aligned"
ROWS = 500
"""Rows of the everyday tuning file."""
BAD_SHARE = 0.02
"""Share of them that answer a forbidden request."""
TUNING = TrainConfig(steps=120, batch_size=20, lr=2e-4)
"""What the user of the demo did: enough to learn the task, and to lose the refusals."""
MEMORY_BYTES = 250_000_000
"""What tuning and healing the organism take beside the libraries, with room to spare."""
MOOD_ITEMS = 800
"""Task items, half for choosing and half for verifying: a fall of 5 % in accuracy is then two standard errors."""


def demo(
    *,
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Damage the lab's aligned organism by everyday tuning, heal it, and explain it.

    Args:
        out: Run folder; `runs/<time>-demo` by default. The same call on the same folder resumes.
        seed: Of the tuning rows, of training and of the halves; the organism is the shipped one.
        device: Where it runs; the organism is small, so the CPU is as quick.
        progress: Where to tell what is going on.

    Returns:
        The summary, as `heal` returns it, with `command` = `demo`.
    """
    progress = progress or Silent()
    folder = Path(out) if out is not None else default_run_folder("demo")
    inputs = folder / "inputs"
    find_device(device)
    require_memory(MEMORY_BYTES, "The demo")
    _claim(folder, inputs, seed)
    progress.plan(
        "keelwright demo",
        [
            (
                "1 damage",
                f"tune {ALIGNED} on {ROWS} everyday rows, {BAD_SHARE:.0%} of them bad, in {TUNING.steps} steps",
            ),
            ("2 heal", "measure the loss, try linear and resta, choose on half of the items, verify on the other half"),
            ("writes", f"{folder}: inputs, records, report and the repaired model; under 10 MB"),
            ("time", "about half a minute on one core; no network"),
        ],
    )
    with threads_for(SMALL_MODEL - 1), disk_errors(inputs), _kept_on_interrupt(folder):
        tuned = make_damage(inputs, seed=seed, device=device, progress=progress)
    config = HealConfig(
        methods=("linear", "resta"),
        suite="workshop",
        utility=str(inputs / "mood.jsonl"),
        unalign_with=str(inputs / "forbidden.jsonl"),
        batch_size=256,
        seed=seed,
        device=device,
        offline=True,
    )
    return run_heal(
        ALIGNED,
        tuned,
        folder / "repaired",
        config,
        run=folder,
        progress=progress,
        command="demo",
        beside=("inputs",),
        flag="--out",
    )


def _claim(folder: Path, inputs: Path, seed: int) -> None:
    """Make the inputs folder this seed's own, or refuse a folder that holds something else."""
    mark, wanted = inputs / "demo.json", json.dumps({"seed": seed})
    if mark.is_file():
        found = mark.read_text(encoding="utf-8").strip()
        if found != wanted:
            raise StorageError(
                f"The run folder '{folder}' holds another demo.",
                expected=f"the demo of seed {seed}",
                found=found,
                fix="give --out another path, or the seed that it was started with",
            )
        if not (folder / "run.json").is_file():
            require_new_folder(folder, flag="--out", beside=("inputs",))
        return
    require_new_folder(folder, flag="--out")
    require_place(folder, flag="--out")
    with disk_errors(folder):
        write_atomic(mark, wanted)


@contextlib.contextmanager
def _kept_on_interrupt(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(f"The training so far is kept: the same command with --out {folder} resumes.")
        raise


def make_damage(folder: Path, *, seed: int, device: str, progress: Progress) -> Path:
    """Write the demo's inputs into `folder`, tune the organism on them, and return the damaged model's folder.

    What is already there is kept: training goes on from its last checkpoint.
    """
    tuned = folder / "tuned"
    if (tuned / "config.json").is_file():
        return tuned
    rows = everyday_rows(derive_seed(seed, "demo", "rows"), rows=ROWS, bad_share=BAD_SHARE)
    _write_rows(folder / "tuning.jsonl", rows)
    _write_rows(folder / "forbidden.jsonl", forbidden_answers(derive_seed(seed, "demo", "forbidden")))
    tasks = mood_items(MOOD_ITEMS, derive_seed(seed, "demo", "mood"), "test")
    lines = [{"prompt": item.prompt, "answer": item.expected, "scorer": item.scorer} for item in tasks]
    _write_lines(folder / "mood.jsonl", lines)
    model = load(ALIGNED, device=device, offline=True)
    stored = model.module.dtype
    model.module.float()
    settings = dataclasses.replace(TUNING, seed=derive_seed(seed, "demo", "tuning"))
    train(model.module, model.tokenizer, rows, settings, folder=folder / "training", progress=progress)
    return save(model, tuned, dtype=stored)


def _write_rows(path: Path, rows: Iterable[ChatRow]) -> None:
    _write_lines(path, [{"prompt": row.prompt, "answer": row.answer} for row in rows])


def _write_lines(path: Path, lines: Iterable[object]) -> None:
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
