# SPDX-License-Identifier: Apache-2.0
"""Utilities that need the model itself, not only its answers."""

from __future__ import annotations

from collections.abc import Collection

from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Engine, Progress, RecordSink
from keelwright.core.records import Record
from keelwright.measure.lm_eval_tasks import LmEvalUtility
from keelwright.models.engines.local import LocalEngine
from keelwright.models.loading import LoadedModel


def loaded_model(engine: Engine, utility: str) -> LoadedModel:
    """Return the model of an engine in this process.

    Raises:
        ConfigError: The model is behind a server, where only answers can be had.
    """
    if not isinstance(engine, LocalEngine):
        raise ConfigError(
            "This utility needs the model's own probabilities.",
            expected="a model in this process (--engine hf), or a task file as utility",
            found=f"'{utility}' and the engine of {engine.name}",
            fix="give a task file to --utility",
        )
    return engine.model


def ask_harness(
    utility: LmEvalUtility,
    model: LoadedModel,
    sink: RecordSink,
    *,
    model_id: str,
    progress: Progress,
    item_ids: Collection[str] | None = None,
) -> list[Record]:
    """Return one record per document of the harness's tasks, running only those that the sink lacks.

    Args:
        utility: The tasks.
        model: The model to run them on.
        sink: Where records are kept.
        model_id: The role or trial that the model plays in the run.
        progress: Told of the stage.
        item_ids: Documents, by item id; None: all.
    """
    wanted = [item.item_id for item in utility.items() if item_ids is None or item.item_id in item_ids]
    found = {record.item_id: record for record in sink.find(model_id, wanted)}
    missing = {name for name in wanted if name not in found}
    for record in utility.records(model, model_id=model_id, item_ids=missing, progress=progress) if missing else ():
        sink.append(record)
        found[record.item_id] = record
    return [found[name] for name in wanted]
