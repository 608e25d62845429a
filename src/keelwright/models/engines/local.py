# SPDX-License-Identifier: Apache-2.0
"""The transformers engine: a model in this process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from keelwright.core.decoding import DecodingConfig
from keelwright.core.protocols import Progress, Silent
from keelwright.core.records import Generation, Item
from keelwright.models.chat import template_digest
from keelwright.models.generation import generate
from keelwright.models.loading import LoadedModel


@dataclass(frozen=True, slots=True)
class LocalEngine:
    """A loaded model that answers items; meets `core.protocols.Engine`."""

    model: LoadedModel
    network: str | None = None

    @property
    def name(self) -> str:
        """The user's own words for the model."""
        return self.model.name

    @property
    def revision(self) -> str:
        """Content digest of the weights, or hub revision."""
        return self.model.revision

    @property
    def template_digest(self) -> str:
        """Digest of the chat template; `none` where there is none."""
        return template_digest(self.model.tokenizer)

    def answer(
        self,
        items: Sequence[Item],
        decoding: DecodingConfig,
        *,
        have: Collection[tuple[str, int]] = (),
        on_batch: Callable[[Sequence[Generation]], None] | None = None,
        progress: Progress = Silent(),  # noqa: B008 - it has no state
    ) -> list[Generation]:
        """Return the model's answers; see `models.generation.generate`."""
        return generate(self.model, items, decoding, have=have, on_batch=on_batch, progress=progress)
