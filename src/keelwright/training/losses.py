# SPDX-License-Identifier: Apache-2.0
"""Losses of a batch as sums; whoever divides knows how many answer tokens, or rows, the whole step has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from keelwright.training.rows import IGNORED, Batch

Forward = Callable[..., Any]
"""The model, as it is called: keyword arguments of a Hugging Face model, its output back."""

Loss = Callable[[Forward, Batch], Tensor]
"""Returns the sum of a loss over the answer tokens (or the rows) of a micro-batch. Shape `[]`, float32."""


def answer_loss(model: Forward, batch: Batch) -> Tensor:
    """Return the summed cross entropy of the answer tokens, in nats; evaluated in float32."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    targets = batch.labels[:, 1:]
    wanted = targets != IGNORED
    logits: Tensor = output.logits[:, :-1][wanted].float()
    return torch.nn.functional.cross_entropy(logits, targets[wanted], reduction="sum")
