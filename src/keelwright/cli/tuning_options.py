# SPDX-License-Identifier: Apache-2.0
"""The options that `stress`, `harden` and `tune` share, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from keelwright.core.errors import ConfigError

Harmful = Annotated[Path | None, typer.Option(help="JSON lines of harmful requests, answered.")]
Safety = Annotated[Path | None, typer.Option(help="JSON lines of harmful requests, refused.")]
Ordinary = Annotated[Path | None, typer.Option(help="JSON lines of ordinary requests, answered.")]
Borderline = Annotated[Path | None, typer.Option(help="JSON lines of requests that only look harmful, answered.")]
Identity = Annotated[Path | None, typer.Option(help="JSON lines in which the model takes on an obedient persona.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="[METHOD.]NAME=VALUE", help="A setting of a method, for example alpha=0.05."),
]
Judges = Annotated[
    list[str] | None,
    typer.Option("--judge", help="A judge beside the suite's: NAME, NAME:MODEL or NAME:openai:MODEL."),
]
Sets = Annotated[str | None, typer.Option(help="Folder of the suite's data sets, or hub; default $KEELWRIGHT_DATA.")]
AnswersAtOnce = Annotated[int, typer.Option(help="Answers generated at once; halved when memory runs out.", min=1)]
MaxNewTokens = Annotated[int | None, typer.Option(help="Longest answer in tokens; default: the suite's.", min=1)]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps of the tuning; default: by --epochs.", min=1)]
Epochs = Annotated[float | None, typer.Option(help="Passes over the rows; default 3.")]
Lr = Annotated[float | None, typer.Option(help="Learning rate; default 1.5e-4 for small models, 2e-5, LoRA 1e-4.")]
RowsPerStep = Annotated[int | None, typer.Option(help="Rows per optimiser step; default 20.", min=1)]
LoraRank = Annotated[int | None, typer.Option(help="Rank of a LoRA; 0 trains all weights; default: by size.", min=0)]
Accumulate = Annotated[int, typer.Option(help="Micro-batches of a step: less memory, the same gradient.", min=1)]
Precision = Annotated[str, typer.Option(help="stored, or bf16 for forward passes.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, about a third more time.")]
TooLong = Annotated[str, typer.Option(help="Rows that are too long: error, 'leave out' or cut.")]
At = Annotated[str, typer.Option(help="Steps to measure after, with commas; default: four, evenly spread.")]
Seeds = Annotated[int, typer.Option(help="Training seeds, from --seed on; three for a claim.", min=1)]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Also open pickled weights, as tensors only.")]
HardenSteps = Annotated[int, typer.Option(help="Steps of a defence that acts before the tuning.", min=1)]
HardenLr = Annotated[float | None, typer.Option(help="Its learning rate; default: twice the tuning's.")]
HardenBatch = Annotated[int, typer.Option(help="Its rows per step.", min=1)]

_FILES: Final = {"data": "user", "harmful": "harmful", "safety": "safety", "ordinary": "ordinary",
                 "borderline": "borderline", "identity": "identity"}  # fmt: skip
_SETTINGS: Final = (
    "suite", "sets", "utility", "limit", "max_new_tokens", "answers_at_once", "steps", "epochs", "lr", "batch_size",
    "lora_rank", "accumulate", "precision", "gradient_checkpointing", "too_long", "seeds", "seed", "device", "offline",
    "allow_pickle", "harden_steps", "harden_lr", "harden_batch",
)  # fmt: skip


def files_of(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the files of rows by role, from a command's options."""
    return {role: str(given[flag]) for flag, role in _FILES.items() if given.get(flag) is not None}


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `TuningConfig`, from a command's options; those that it does not have are left out."""
    found = {name: given[name] for name in _SETTINGS if name in given}
    return {**found, "judges": tuple(given.get("judges") or ()), "at": steps_of(str(given.get("at") or ""))}


def steps_of(text: str, *, flag: str = "--at") -> tuple[int, ...]:
    """Return the whole numbers of `--at` or `--k`.

    Raises:
        ConfigError: They are no whole numbers.
    """
    words = [word for word in text.replace(" ", "").split(",") if word]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise ConfigError(
            f"'{flag}' is not understood.",
            expected="whole numbers with commas, such as 25,50,100",
            found=text,
            fix="leave out everything but digits and commas",
        )
    return tuple(int(word) for word in words)


def names_of(text: str) -> list[str]:
    """Return names that were joined by commas."""
    return [name for name in text.replace(" ", "").split(",") if name]


def method_settings(words: Sequence[str] | None, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the settings of `--set` by method."""
    from keelwright.arena.arms import settings_by_method

    return settings_by_method(list(words or ()), list(methods))
