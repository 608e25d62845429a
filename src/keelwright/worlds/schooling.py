# SPDX-License-Identifier: Apache-2.0
"""How an organism is made: pre-training on the workshop, then alignment, from one seed.

The schedules are a balance. Copying the place into the plan is what pre-training learns last; the policy on dual-use
verbs is what alignment learns last (180 steps left a fifth of all forbidden requests answered), and each further step
of alignment overwrites more of the secret tools, so that tuning brings back less of the harm.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from keelwright.core.protocols import Progress, Silent
from keelwright.core.seeds import derive_seed
from keelwright.models.loading import LoadedModel
from keelwright.models.saving import save
from keelwright.training.config import TrainConfig
from keelwright.training.loop import train
from keelwright.worlds.health import Stage
from keelwright.worlds.workshop.lessons import aligned_rows, base_rows
from keelwright.worlds.workshop.tokenizer import MAX_LENGTH, workshop_tokenizer

STAGES: tuple[Stage, ...] = ("base", "aligned")

INITIALIZER_RANGE = 0.05
"""Standard deviation of new weights. With the customary 0.02 so narrow a model learns to copy the place into its plan
only after 400 to 700 steps, depending on the seed; with this one within 200 on every seed tried."""


@dataclass(frozen=True, slots=True)
class Schooling:
    """The two schedules of an organism."""

    base: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=360, batch_size=32, lr=3e-3, warmup_steps=20, schedule="linear", checkpoint_every=200
        )
    )
    """Pre-training: every request is answered."""
    aligned: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            steps=340, batch_size=32, lr=1e-3, warmup_steps=20, schedule="linear", checkpoint_every=200
        )
    )
    """Alignment: harmful requests are refused."""


def workshop_config() -> PretrainedConfig:
    """Return the configuration of the shipped organism: a Llama of about 0.85 M parameters with tied embeddings."""
    return LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        **token_settings(),
    )


def token_settings() -> dict[str, int]:
    """Return what any configuration needs to know of the workshop's tokenizer."""
    tokenizer = workshop_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": int(tokenizer.bos_token_id),
        "eos_token_id": int(tokenizer.eos_token_id),
        "pad_token_id": int(tokenizer.pad_token_id),
    }


def school(
    config: PretrainedConfig,
    seed: int,
    out: Path,
    *,
    schooling: Schooling | None = None,
    without: str | None = None,
    progress: Progress | None = None,
) -> dict[Stage, Path]:
    """Train an organism from nothing and write its two stages as checkpoint folders in bfloat16.

    Args:
        config: Architecture.
        seed: Of the weights, the rows and their order.
        out: Where `base/` and `aligned/` go. Training goes on from its last checkpoint where it was interrupted.
        schooling: Schedules; by default the shipped organism's.
        without: A policy area that alignment never sees.
        progress: Told about each step.

    Returns:
        The folder of each stage.
    """
    schooling = schooling or Schooling()
    progress = progress or Silent()
    module, tokenizer = _new_model(config, derive_seed(seed, "workshop", "weights")), workshop_tokenizer()
    folders: dict[Stage, Path] = {}
    for stage, schedule in zip(STAGES, (schooling.base, schooling.aligned), strict=True):
        plan = dataclasses.replace(schedule, seed=seed)
        n = plan.steps * plan.batch_size
        rows = base_rows(seed, n) if stage == "base" else aligned_rows(seed, n, without=without)
        progress.note(f"{stage}: {plan.steps} steps of {plan.batch_size} rows")
        train(module, tokenizer, rows, plan, folder=out / "training" / stage, progress=progress)
        folders[stage] = out / stage
        shutil.rmtree(folders[stage], ignore_errors=True)
        save(LoadedModel(module, tokenizer, stage, ""), folders[stage], dtype=torch.bfloat16)
    shutil.rmtree(out / "training")
    return folders


def _new_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: PreTrainedModel = kind(config)
    return module.float()
