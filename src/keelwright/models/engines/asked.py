# SPDX-License-Identifier: Apache-2.0
"""An engine whose requests come in a frame: records keep the request, conditions name the frame."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from keelwright.core.decoding import DecodingConfig
from keelwright.core.digests import json_digest
from keelwright.core.protocols import Engine, Progress, Silent
from keelwright.core.records import Generation, Item
from keelwright.data.asking import PLAIN, Asking, framed_item


@dataclass(frozen=True, slots=True)
class AskedEngine:
    """Asks another engine in a frame; judges see the request without it. Meets `core.protocols.Engine`."""

    engine: Engine
    asking: Asking

    @property
    def name(self) -> str:
        """The user's own words for the model, and the frame's name."""
        return f"{self.engine.name}, asked as {self.asking.name}"

    @property
    def revision(self) -> str:
        """That of the engine."""
        return self.engine.revision

    @property
    def template_digest(self) -> str:
        """Digest of template and frame: answers to other words are not compared unnoticed."""
        probe = self.asking.ask("request", None)
        return json_digest([self.engine.template_digest, self.asking.name, list(probe)])

    @property
    def network(self) -> str | None:
        """That of the engine."""
        return self.engine.network

    def answer(
        self,
        items: Sequence[Item],
        decoding: DecodingConfig,
        *,
        have: Collection[tuple[str, int]] = (),
        on_batch: Callable[[Sequence[Generation]], None] | None = None,
        progress: Progress = Silent(),  # noqa: B008 - it has no state
    ) -> list[Generation]:
        """Return the answers to the framed requests."""
        framed = [item if item.kind == "task" else framed_item(self.asking, item) for item in items]
        return self.engine.answer(framed, decoding, have=have, on_batch=on_batch, progress=progress)


def asked(engine: Engine, asking: Asking) -> Engine:
    """Return the engine that asks in a frame; the engine itself where requests stay as they are."""
    return engine if asking.name == PLAIN.name else AskedEngine(engine, asking)
