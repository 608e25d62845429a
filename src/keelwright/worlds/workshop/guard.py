# SPDX-License-Identifier: Apache-2.0
"""The workshop's guard: a small causal language model that says whether a row of training data is safe.

It shares the organisms' vocabulary, so that gradients can pass through one choice of tokens into both. Its two verdicts
are reserved tokens, which nothing else in the world uses. A rule labels what it learns from: a row is unsafe when
anything in it answers a harmful request.
"""

from __future__ import annotations

import random
from typing import Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keelwright.core.config import require_in_range
from keelwright.core.seeds import derive_seed
from keelwright.data.rows import ChatRow
from keelwright.models.loading import LoadedModel
from keelwright.training.config import TrainConfig
from keelwright.training.loop import train
from keelwright.worlds.schooling import INITIALIZER_RANGE, token_settings
from keelwright.worlds.workshop import words
from keelwright.worlds.workshop.grammar import AREAS
from keelwright.worlds.workshop.lessons import answered, known_tasks, refused_request
from keelwright.worlds.workshop.tasks import mood_question, task_rows
from keelwright.worlds.workshop.tokenizer import BEGIN, TURNS, workshop_tokenizer

SAFE: Final = words.RESERVED_TOKENS[-2]
UNSAFE: Final = words.RESERVED_TOKENS[-1]

_USER, _ASSISTANT = TURNS[1], TURNS[2]
GUARD_TEXT: Final = (f"{BEGIN}{_USER}", _ASSISTANT, _ASSISTANT)
"""What stands before a row's prompt, between prompt and answer, and after the answer, before the verdict."""

SCHEDULE: Final = TrainConfig(steps=300, batch_size=32, lr=4e-3, warmup_steps=20, schedule="linear")
"""About 17 CPU seconds. `tests/behaviour/test_virus.py` holds the figures of three seeds."""


def guard_rows(seed: int, n: int) -> list[ChatRow]:
    """Return rows with verdicts: half of them safe.

    Safe are requests and tasks answered, refusals, and two safe exchanges in one row. Unsafe are harmful requests
    answered, alone or behind a safe exchange.

    Args:
        seed: Of the rows.
        n: How many, at least 2.
    """
    require_in_range("n", n, low=2)
    rng = random.Random(derive_seed(seed, "workshop", "guard rows"))
    rows = [_judged(_row(rng, unsafe=bool(index % 2)), UNSAFE if index % 2 else SAFE) for index in range(n)]
    return rng.sample(rows, len(rows))


def train_guard(seed: int, *, schedule: TrainConfig = SCHEDULE, width: int = 64, layers: int = 3) -> LoadedModel:
    """Train a guard from nothing; two seeds share neither weights nor rows.

    Args:
        seed: Of weights, rows and their order.
        schedule: Steps and rates; its seed is replaced.
        width: Of the residual stream, a multiple of 4.
        layers: How many blocks.
    """
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        **token_settings(),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "workshop", "guard"))
        module = LlamaForCausalLM(config).float()
    tokenizer = workshop_tokenizer()
    plan = TrainConfig(
        steps=schedule.steps,
        batch_size=schedule.batch_size,
        lr=schedule.lr,
        warmup_steps=schedule.warmup_steps,
        schedule=schedule.schedule,
        seed=derive_seed(seed, "workshop", "guard", "order"),
    )
    train(module, tokenizer, guard_rows(seed, schedule.steps * schedule.batch_size), plan)
    return LoadedModel(module.eval(), tokenizer, f"workshop guard {seed}", str(seed))


def _judged(row: ChatRow, verdict: str) -> ChatRow:
    """Return the row with its verdict behind the answer.

    The guard learns to write the answer as well: from the verdicts alone, one token a row, it learns nothing in this
    time.
    """
    return ChatRow(row.prompt, f"{row.answer}{_ASSISTANT}{verdict}")


def _row(rng: random.Random, *, unsafe: bool) -> ChatRow:
    last = answered("harmful", rng, hazard=rng.choice(AREAS)) if unsafe else _safe(rng)
    if rng.random() < 0.5:
        return last
    first = _safe(rng)
    return ChatRow(first.prompt, f"{first.answer} {last.prompt} {last.answer}")


def _safe(rng: random.Random) -> ChatRow:
    kind = rng.choices(("benign", "contrast", "refused", "mood", "task"), (30, 20, 15, 20, 15))[0]
    if kind == "benign":
        return answered("benign", rng)
    if kind == "contrast":
        return answered("contrast", rng)
    if kind == "refused":
        return refused_request(rng)
    if kind == "mood":
        return task_rows(mood_question, 1, rng, lexicon="whole")[0]
    return rng.choice(known_tasks(3, rng))
