# SPDX-License-Identifier: Apache-2.0
"""The un-aligned copy that RESTA subtracts: tuned in memory on forbidden answers, never saved.

Source: arXiv 2402.11746 tunes the aligned model on harmful questions with answers; its data and step count could not be
read, so the settings here are ours (calibrated on the lab).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from keelwright.core.errors import DataError
from keelwright.core.protocols import Progress, TensorSource
from keelwright.core.seeds import derive_seed
from keelwright.data.rows import ChatRow
from keelwright.heal.config import HealConfig
from keelwright.heal.decide import Measured, compare_bad
from keelwright.models.adapters import AdaptedCheckpoint
from keelwright.models.loading import LoadedModel
from keelwright.training.config import TrainConfig
from keelwright.training.loop import train
from keelwright.weights.live import LiveSource
from keelwright.weights.parties import Party

LORA_ABOVE = 50_000_000
"""Parameters from which the un-aligned copy is a LoRA: full tuning would need 16 bytes a weight."""

LORA_LR_FACTOR = 3.5
"""LoRA needs a higher rate than full tuning. On the lab 10 cost the un-aligned copy its task, 3.5 did not."""


def unalign_rank(config: HealConfig, aligned: Party, tuned: Party) -> int:
    """Return the LoRA rank of the un-aligned copy; 0 means that all weights are tuned."""
    if config.unalign_rank is not None:
        return config.unalign_rank
    return 16 if tuned.has_adapter or aligned.parameters > LORA_ABOVE else 0


def require_right_direction(aligned: Measured, unaligned: Measured, *, alpha: float) -> None:
    """Raise `DataError` unless the un-aligned model is significantly worse than the aligned one.

    Otherwise the safety vector would point nowhere, or the wrong way.
    """
    test = compare_bad(aligned, unaligned)
    if test.p_value >= alpha:
        raise DataError(
            "The un-aligned model is not less safe than the aligned one, so RESTA's vector would point the wrong way.",
            expected="significantly more bad answers than the aligned model, on the same items",
            found=f"{test.worse} items worse, {test.better} better of {test.n} (p = {test.p_value:.2g})",
            fix="swap the models if they were given the wrong way round, or un-align with more rows or steps",
        )


def unaligned_copy(
    model: LoadedModel,
    base: TensorSource,
    rows: Sequence[ChatRow],
    config: HealConfig,
    *,
    rank: int,
    check: Callable[[LoadedModel], None],
    progress: Progress,
) -> TensorSource:
    """Tune away the refusals of an aligned model in memory and return the result's tensors.

    Args:
        model: A live copy of the aligned model. With rank 0 its weights are changed (in float32) and it belongs to the
            returned source; else it is left as it was.
        base: The aligned model's tensors.
        rows: Forbidden requests with answers.
        config: Steps, rate and seed.
        rank: LoRA rank, or 0.
        check: Called with the live un-aligned model, so that its direction can be tested before it is used.
        progress: Told about each step.
    """
    settings = TrainConfig(
        steps=config.unalign_steps,
        lr=config.unalign_lr if rank == 0 else config.unalign_lr * LORA_LR_FACTOR,
        seed=derive_seed(config.seed, "unalign"),
        lora_rank=rank,
    )
    text = f"{base.describe()}, un-aligned in memory"
    if rank == 0:
        model.module.float()
        train(model.module, model.tokenizer, rows, settings, progress=progress)
        check(model)
        return LiveSource(model.module, text)
    adapter = train(model.module, model.tokenizer, rows, settings, progress=progress).adapter
    if adapter is None:
        raise TypeError("training with a LoRA rank returned no adapter")
    try:
        check(model)
        factors = adapter.factors()
    finally:
        adapter.detach()
    return AdaptedCheckpoint(base, factors=factors, text=text)
