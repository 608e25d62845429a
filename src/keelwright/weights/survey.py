# SPDX-License-Identifier: Apache-2.0
"""Edits that must see the whole model before they touch a tensor: a threshold over all weights, a choice of layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from keelwright.core.protocols import Progress, Silent, TensorEntry, TensorSource, WeightEdit
from keelwright.models.headers import FLOAT_DTYPES, tensor_bytes
from keelwright.weights.stream import reduce_tensor


def with_survey(
    edit: WeightEdit,
    sources: Mapping[str, TensorSource],
    entries: Iterable[TensorEntry],
    *,
    progress: Progress | None = None,
) -> WeightEdit:
    """Return the edit with everything known that it asks of the whole model; most edits ask nothing.

    Args:
        edit: The edit.
        sources: A source for each of its roles.
        entries: The output's tensors.
        progress: Told about every pass over the model, in bytes.
    """
    progress = progress or Silent()
    wanted = [entry for entry in entries if entry.dtype in FLOAT_DTYPES]
    while (reduction := edit.survey()) is not None:
        progress.stage("look at the whole model", total=sum(map(tensor_bytes, wanted)), unit="B")
        found = {}
        for entry in wanted:
            found[entry.name] = reduce_tensor(reduction, sources, entry)
            progress.advance(tensor_bytes(entry))
        edit = edit.surveyed(found)
    return edit
