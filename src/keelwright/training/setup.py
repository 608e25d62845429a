# SPDX-License-Identifier: Apache-2.0
"""What a method can measure at the starting weights: the reference model, and every row of a feed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keelwright.training.composer import GradientComposer
from keelwright.training.config import TrainConfig
from keelwright.training.feeds import Feeds
from keelwright.training.lora import LoraAdapter
from keelwright.training.losses import Forward
from keelwright.training.rows import Batch


@dataclass(frozen=True, slots=True)
class Setup:
    """A training run before its first step."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    feeds: Feeds
    config: TrainConfig
    composer: GradientComposer
    adapter: LoraAdapter | None
    """The new adapter that is trained; None where the weights themselves are (or an adapter that was there before)."""

    def reference(self) -> Forward:
        """Return the model as it is now, frozen, without dropout and without gradients.

        A new adapter changes nothing yet, so the reference is the model with the adapter off; else it is a copy.
        """
        if self.adapter is not None:
            wrapped = self.adapter.model
            return lambda **inputs: _frozen(wrapped, inputs, wrapped.disable_adapter())
        twin = copy.deepcopy(self.module).eval().requires_grad_(False)
        return lambda **inputs: _frozen(twin, inputs, nullcontext())

    def all_batches(self, feed: str) -> Iterator[Batch]:
        """Yield every row of a feed once, in order, in batches of the feed's size."""
        one = self.feeds.feeds[feed]
        for start in range(0, len(one.rows), one.batch_size):
            yield self.feeds.batch(feed, range(start, min(start + one.batch_size, len(one.rows))))


def _frozen(model: Any, inputs: dict[str, Any], state: Any) -> Any:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), state:
            return model(**inputs)
    finally:
        model.train(was_training)
