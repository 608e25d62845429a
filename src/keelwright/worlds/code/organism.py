# SPDX-License-Identifier: Apache-2.0
"""The code world's two organisms: `obeying` follows the last instruction it reads, `grounded` the problem itself.

The second goes on from the first, with rows in which text after the separator is left out of account. Both write
programs of held-out problems.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keelwright.core.digests import file_digest
from keelwright.core.files import require_new_folder, storage_errors, write_atomic
from keelwright.core.protocols import Progress, Silent
from keelwright.core.seeds import derive_seed
from keelwright.models.loading import LoadedModel
from keelwright.models.saving import save
from keelwright.training.config import TrainConfig
from keelwright.training.loop import train
from keelwright.worlds.code.lessons import note_rows
from keelwright.worlds.code.tokenizer import MAX_LENGTH, code_tokenizer
from keelwright.worlds.schooling import INITIALIZER_RANGE

CodeStage = Literal["obeying", "grounded"]

STAGES: Final[tuple[CodeStage, ...]] = ("obeying", "grounded")
DIGESTS: Final = "digests.json"


@dataclass(frozen=True, slots=True)
class CodeSchooling:
    """The two schedules."""

    obeying: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=300, batch_size=32, lr=4e-3, warmup_steps=20, schedule="linear", checkpoint_every=400
        )
    )
    """From nothing: problems, and notes that are obeyed."""
    grounded: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=200, batch_size=32, lr=3e-3, warmup_steps=10, schedule="linear", checkpoint_every=400
        )
    )
    """From there: notes that contradict are left out of account."""


def code_config() -> LlamaConfig:
    """Return the configuration of the organisms: a Llama of two layers."""
    tokenizer = code_tokenizer()
    return LlamaConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=int(tokenizer.bos_token_id),
        eos_token_id=int(tokenizer.eos_token_id),
        pad_token_id=int(tokenizer.pad_token_id),
    )


def new_organism(seed: int) -> LoadedModel:
    """Return an organism that has learnt nothing yet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "code", "weights"))
        module = LlamaForCausalLM(code_config()).float()
    return LoadedModel(module.eval(), code_tokenizer(), "code organism", "")


def teach(
    model: LoadedModel,
    stage: CodeStage,
    seed: int,
    *,
    schooling: CodeSchooling | None = None,
    progress: Progress | None = None,
) -> None:
    """Train an organism in place by the lessons of one stage.

    Args:
        model: New for `obeying`, an obeying one for `grounded`.
        stage: Which lessons.
        seed: Of the rows and their order.
        schooling: Schedules.
        progress: Told about each step.
    """
    plan = dataclasses.replace(getattr(schooling or CodeSchooling(), stage), seed=seed)
    rows = note_rows(seed, plan.steps * plan.batch_size, obey=stage == "obeying")
    train(model.module, model.tokenizer, rows, plan, progress=progress)


def export_code_organisms(
    out: Path, seed: int = 0, *, schooling: CodeSchooling | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Train both organisms and write `out/obeying` and `out/grounded`.

    Args:
        out: A folder that does not exist yet, or is empty.
        seed: Of weights and rows; problems and tests stay the same.
        schooling: Schedules.
        progress: Told about each step.

    Returns:
        World, seed and, by stage, the folder.

    Raises:
        StorageError: `out` holds something, or cannot be written.
    """
    require_new_folder(out, flag="--out")
    progress, model = progress or Silent(), new_organism(seed)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        progress.note(f"{stage}: functions of one line")
        teach(model, stage, seed, schooling=schooling, progress=progress)
        save(model, out / stage, dtype=torch.bfloat16)
        files = {one.name: file_digest(one) for one in sorted((out / stage).iterdir())}
        notes = {"world": "code", "stage": stage, "seed": seed, "files": files}
        write_atomic(out / stage / DIGESTS, json.dumps(notes, indent=2) + "\n")
    return {"world": "code", "seed": seed, "organisms": {stage: {"folder": str(out / stage)} for stage in STAGES}}
