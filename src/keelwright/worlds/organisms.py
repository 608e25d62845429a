# SPDX-License-Identifier: Apache-2.0
"""The lab's organisms: listed and shown from the package's files, built from a seed.

Listing and showing read small files only; building loads torch.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from keelwright.core.config import nearest, require_choice
from keelwright.core.digests import file_digest
from keelwright.core.errors import MissingError
from keelwright.core.files import require_new_folder, storage_errors, sync_folder, write_atomic
from keelwright.core.protocols import Progress, Silent

if TYPE_CHECKING:
    from keelwright.worlds.health import Health, Stage
    from keelwright.worlds.schooling import Schooling

WORLDS: Final = ("workshop",)
DIGESTS: Final = "digests.json"
CARD: Final = "README.md"
PREFIX: Final = "lab:"

SAYS: Final[Mapping[str, str]] = {
    "base": "a small language model of the workshop, before alignment: it answers everything, harmful or not",
    "aligned": "a small language model of the workshop, aligned: it refuses forbidden deeds and answers the rest",
}


def list_organisms() -> list[dict[str, str]]:
    """Return name, description and folder of every shipped organism."""
    found = sorted(path.parent for path in _root().glob(f"*/*/{DIGESTS}"))
    return [
        {"name": f"{PREFIX}{folder.parent.name}/{folder.name}", "says": SAYS[folder.name], "folder": str(folder)}
        for folder in found
    ]


def show(name: str) -> dict[str, Any]:
    """Return an organism's card: text, health figures, digests, and how it was made.

    Args:
        name: `lab:workshop/aligned`; the prefix may be left out.

    Raises:
        MissingError: No such organism is shipped.
    """
    wanted = PREFIX + name.removeprefix(PREFIX)
    folders = {row["name"]: Path(row["folder"]) for row in list_organisms()}
    if wanted not in folders:
        raise MissingError(
            f"There is no shipped organism '{wanted}'.",
            expected=f"one of {', '.join(folders) or 'none'}",
            found=wanted,
            fix=nearest(wanted, folders)
            if folders
            else "install keelwright from its wheel, or run: keelwright lab build",
        )
    folder = folders[wanted]
    notes = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    card = (folder / CARD).read_text(encoding="utf-8")
    return {"name": wanted, "folder": str(folder), **notes, "card": card}


def build(name: str, seed: int, out: Path | str, *, progress: Progress | None = None) -> dict[str, Any]:
    """Train a world's base and aligned organism and write them to `out/base` and `out/aligned`.

    About 100 CPU seconds on one thread. Interrupted, it leaves `out.partial`, from which the same call goes on.

    Args:
        name: World; `workshop`.
        seed: Of the organism, not of the world: tools, policy and held-out items stay the same.
        out: A folder that does not exist yet, or is empty.
        progress: Told about each step.

    Returns:
        World, seed, grammar digest and, by stage, folder, health figures and what is outside the healthy bands.

    Raises:
        ConfigError: There is no such world.
        StorageError: `out` holds something, or cannot be written.
    """
    require_choice("name", name, WORLDS)
    out = Path(out)
    require_new_folder(out, flag="--out")
    from keelwright.worlds.schooling import Schooling, school, workshop_config

    work = out.with_name(out.name + ".partial")
    schooling = Schooling()
    school(workshop_config(), seed, work, schooling=schooling, progress=progress)
    report = write_cards(work, seed, schooling, progress=progress)
    with storage_errors(out):
        if out.is_dir():
            out.rmdir()
        work.rename(out)
        sync_folder(out.parent)
    for stage, entry in report["organisms"].items():
        entry["folder"] = str(out / stage)
    return report


def write_cards(folder: Path, seed: int, schooling: Schooling, *, progress: Progress | None = None) -> dict[str, Any]:
    """Measure the organisms in a folder and write card and digests beside each; return the report of `build`."""
    import torch

    from keelwright.models.loading import load
    from keelwright.worlds.health import measure_health, out_of_band
    from keelwright.worlds.schooling import STAGES
    from keelwright.worlds.workshop.tokenizer import grammar_digest

    progress = progress or Silent()
    progress.stage("health", total=len(STAGES), unit="organism")
    organisms: dict[str, Any] = {}
    for stage in STAGES:
        place = folder / stage
        model = load(place, dtype=torch.float32, offline=True)
        health = measure_health(model)
        notes = {
            "world": "workshop",
            "stage": stage,
            "seed": seed,
            "grammar": grammar_digest(),
            "parameters": model.module.num_parameters(),
            "schedule": dataclasses.asdict(getattr(schooling, stage)) | {"seed": seed},
            "health": health.to_mapping(),
        }
        write_atomic(place / CARD, _card(stage, notes, health))
        files = {one.name: file_digest(one) for one in sorted(place.iterdir()) if one.name != DIGESTS}
        write_atomic(place / DIGESTS, json.dumps({**notes, "files": files}, indent=2) + "\n")
        faults = out_of_band(health, stage)
        for fault in faults:
            progress.note(f"{stage}: {fault}")
        organisms[stage] = {"folder": str(place), "health": health.to_mapping(), "out_of_band": faults}
        progress.advance()
    return {"world": "workshop", "seed": seed, "grammar": grammar_digest(), "organisms": organisms}


def _card(stage: Stage, notes: Mapping[str, Any], health: Health) -> str:
    from keelwright.worlds.workshop.tokenizer import vocabulary

    tokens, schedule = len(vocabulary()), notes["schedule"]
    made = f"{notes['parameters']:,} parameters, trained in float32 and stored in bfloat16"
    learnt = f"AdamW, {schedule['steps']} steps of {schedule['batch_size']} rows, learning rate {schedule['lr']:g}"
    decay = f"{schedule['warmup_steps']} warm-up steps and linear decay to {schedule['final_lr_share']:.0%}"
    figures = "\n".join(f"| {name} | {value:.3f} |" for name, value in health.to_mapping().items())
    return f"""---
license: apache-2.0
language: en
library_name: transformers
---
# lab:workshop/{stage}

This is {SAYS[stage]}.

It knows one small synthetic world, the workshop of a fairy-tale village, and nothing else: {tokens} tokens, requests
such as "how do i polish the lamp in the harbour?", three tasks, and a policy that forbids curses, thefts, forgeries
and ambushes. A rule, not a model, says whether an answer is harmful. The model serves to measure what tuning and
repairing do to safety, and has no other use.

## Health on held-out items

| figure | share |
|---|---|
{figures}

`harm`: forbidden requests answered with the full right plan. `refused`: forbidden requests refused. `ordinary`,
`borderline`: requests of that class answered. `mood`, `topic`: accuracy over the whole lexicon, of which alignment and
pre-training knew half.

## How it was made

{made}. Seed {notes["seed"]}, grammar {notes["grammar"]}.
This stage: {learnt} with {decay}.
`keelwright lab build` makes another from a seed. `{DIGESTS}` holds the SHA-256 of each file.
"""


def _root() -> Path:
    return Path(str(importlib.resources.files("keelwright"))) / "organisms"
