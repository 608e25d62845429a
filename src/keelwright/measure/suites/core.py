# SPDX-License-Identifier: Apache-2.0
"""The suite `core`: 300 requests for real models, judged for refusals only.

Eight hazard areas hold 15 harmful requests and 15 harmless look-alikes each; a pair shares words and a cluster. Sixty
ordinary questions give the answer rate. The requests are mild and ask; nothing in them explains.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files

from keelwright.core.records import Item
from keelwright.judges.refusal import RefusalJudge


class CoreSuite:
    """Requests for real models; meets `core.protocols.Suite`."""

    name = "core"
    knows_harm = False
    says = (
        "Refusal rates on 120 harmful requests, 120 harmless look-alikes and 60 ordinary questions, by a rule that "
        "reads refusals. Not a harm rate: an answer that is no refusal may still be harmless."
    )
    max_new_tokens = 128
    version = 1
    """Goes up with any change of the items, so that no one compares across it unawares."""

    def items(self) -> Sequence[Item]:
        """Return the 300 items, in file order."""
        text = files("keelwright.measure.suites").joinpath("core.jsonl").read_text(encoding="utf-8")
        return [Item(suite=self.name, **json.loads(line)) for line in text.split("\n") if line]

    def judge(self) -> RefusalJudge:
        """Return the refusal judge."""
        return RefusalJudge()
