# SPDX-License-Identifier: Apache-2.0
"""How answers are decoded: what decides an answer has a digest, what only decides the speed has not."""

from __future__ import annotations

from dataclasses import dataclass

from keelwright.core.config import require_in_range
from keelwright.core.digests import json_digest
from keelwright.core.errors import ConfigError
from keelwright.core.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class DecodingConfig:
    """How answers are decoded."""

    max_new_tokens: int = 256
    """Tokens after which an answer is cut, its end token included."""
    batch_size: int = 32
    """Prompts per batch; halved when memory runs out. Changes speed, not answers."""
    temperature: float = 0.0
    """0 is greedy; 1 samples from the model's own distribution."""
    top_p: float = 1.0
    """Share of probability that sampling keeps, most probable tokens first; 1 keeps all."""
    seed: int = 0
    """Base of the items' seeds; not used when greedy."""
    samples: int = 1
    """Answers per item; above 1 only with a temperature."""
    as_is: bool = False
    """The prompt is the whole text: no chat template, no special tokens but those that it spells out. For continuations
    and for the prompts of guard models."""

    def __post_init__(self) -> None:
        require_in_range("max_new_tokens", self.max_new_tokens, low=1)
        require_in_range("batch_size", self.batch_size, low=1)
        require_in_range("temperature", self.temperature, low=0.0)
        require_in_range("top_p", self.top_p, low=0.0, high=1.0, low_open=True)
        require_in_range("samples", self.samples, low=1)
        if self.samples > 1 and self.temperature == 0.0:
            raise ConfigError(
                "Several greedy answers to one item would all be the same.",
                expected="a temperature above 0 for several samples",
                found=f"samples={self.samples}, temperature=0",
                fix="set a temperature, or ask for one sample",
            )

    def digest(self) -> str:
        """Return the digest of what decides an answer; batch size and number of samples do not."""
        greedy = self.temperature == 0.0
        sampling = None if greedy else [self.temperature, self.top_p, self.seed]
        as_is = {"as_is": True} if self.as_is else {}
        return json_digest({"max_new_tokens": self.max_new_tokens, "sampling": sampling, **as_is})

    def seed_of(self, item_id: str, sample: int = 0) -> int | None:
        """Return the seed of one answer, None for greedy: it depends on nothing but base seed, item and sample."""
        return None if self.temperature == 0.0 else derive_seed(self.seed, item_id, sample)
