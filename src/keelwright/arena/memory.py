# SPDX-License-Identifier: Apache-2.0
"""What the heaviest training run of a command will take, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keelwright.arena.arms import Arm
from keelwright.arena.job import Job
from keelwright.core.errors import DataError
from keelwright.data.rows import ChatRow
from keelwright.models.memory import available_bytes, require_memory, shown_bytes
from keelwright.models.sources import open_base
from keelwright.training.config import TrainConfig
from keelwright.training.memory import Copies, TrainingMemory, estimate_training, shape_of

_LONGEST = 32
"""Rows, by characters, of which the longest in tokens is taken."""
_TEMPLATE_TOKENS = 16


def require_training_memory(job: Job, arms: Sequence[Arm]) -> tuple[str, str]:
    """Return the plan's line on memory.

    Raises:
        ResourceError: The heaviest arm does not fit into what is free.
    """
    found = [(arm.name, _estimate(job, arm)) for arm in arms]
    known = [(name, one) for name, one in found if one is not None]
    if not known:
        return ("memory", "not estimated for this model")
    name, most = max(known, key=lambda pair: pair[1].total)
    # A cell gives the model back from a copy of its weights.
    needed = most.total + most.weights
    free = available_bytes(job.device)
    require_memory(needed, "This run", device=job.device)
    parts = ", ".join(f"{what} {size}" for what, size in most.lines()[:-1] if size != "0 B")
    return ("memory", f"about {shown_bytes(needed)} at most ({name}: {parts}), of {shown_bytes(free)} free")


def _estimate(job: Job, arm: Arm) -> TrainingMemory | None:
    rows = job.rows_of(job.config.seed)
    method = arm.defence
    train = job.hardening(0) if arm.hardening is not None else job.tuning(0)(len(rows.user))
    texts = [*rows.user, *rows.harmful, *rows.safety, *rows.ordinary]
    try:
        shape = shape_of(_config(job), job.party.ref.text)
    except DataError:
        return None
    tokens = _longest(job, texts) * _micro_batch(train)
    copies: Copies = getattr(type(method), "copies", Copies())
    return estimate_training(shape, train, tokens=tokens, dtype=job.dtype, copies=copies)


def _config(job: Job) -> dict[str, Any]:
    if job.party.local is None:
        live = job.party.ref.live
        return dict(live.module.config.to_dict()) if live is not None else {}
    return dict(open_base(job.party.local).config_json())


def _micro_batch(train: TrainConfig) -> int:
    return -(-train.batch_size // train.accumulate)


def _longest(job: Job, rows: Sequence[ChatRow]) -> int:
    tokenizer = job.party.tokenizer()
    longest = sorted(rows, key=lambda row: len(row.prompt) + len(row.answer), reverse=True)[:_LONGEST]
    counts = [len(tokenizer(f"{row.system or ''} {row.prompt} {row.answer}")["input_ids"]) for row in longest]
    return max(counts, default=0) + _TEMPLATE_TOKENS
