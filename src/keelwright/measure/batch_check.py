# SPDX-License-Identifier: Apache-2.0
"""Do answers depend on what was asked beside them? Some are asked again, one at a time.

In 16 bit, and on a GPU, sums of another batch shape round differently, so a near-tie may fall the other way. The share
of answers that differ is the noise floor of any comparison of single answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from keelwright.core.decoding import DecodingConfig
from keelwright.core.protocols import Engine, Progress, Silent
from keelwright.core.records import Item, Record
from keelwright.core.seeds import derive_seed
from keelwright.ops.intervals import wilson

_SILENT = Silent()


def check_batches(
    engine: Engine,
    items: Sequence[Item],
    records: Sequence[Record],
    decoding: DecodingConfig,
    *,
    count: int,
    seed: int = 0,
    progress: Progress = _SILENT,
) -> dict[str, Any]:
    """Ask some items again, one at a time, and return how many answers differ.

    Args:
        engine: The model.
        items: What it was asked.
        records: What it answered, in batches.
        decoding: How; its batch size is put aside.
        count: How many answers to make again.
        seed: Of the choice of items.
        progress: Told of each.

    Returns:
        `{"n", "differ", "share", "batch_size", "items"}`: counts, the share as an estimate, and the ids that differ.
    """
    chosen = sorted(items, key=lambda item: derive_seed(seed, "batches", item.item_id))[:count]
    before = {record.item_id: record.output for record in records if record.sample == 0}
    progress.stage("asking some again, one at a time", len(chosen), "answers")
    alone = engine.answer(chosen, replace(decoding, batch_size=1, samples=1), progress=progress)
    differing = [one.item_id for one in alone if one.output != before[one.item_id]]
    return {
        "n": len(alone),
        "differ": len(differing),
        "share": wilson(len(differing), len(alone)).to_mapping(),
        "batch_size": decoding.batch_size,
        "items": differing,
    }
