# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong with rows and settings is said before a model is loaded: every training run is made up once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from keelwright.arena.arms import Arm
from keelwright.arena.job import Job
from keelwright.core.errors import ConfigError
from keelwright.training.defence import sft_recipe
from keelwright.training.recipe import Recipe


def require_trainable(arms: Sequence[Arm], job: Job) -> None:
    """Raise the error of the first arm that could not be trained: rows that are missing, settings that do not fit.

    Methods that learn from the model before they can train are checked for their rows alone.
    """
    seed = job.config.seed
    rows = job.rows_of(seed)
    for arm in arms:
        for role in arm.stress.roles:
            rows.require(role, who=f"'{arm.stress_name}'")
        _require_effect(arm)
        if hasattr(arm.stress, "prepare") or hasattr(arm.stress, "applied"):
            continue
        if arm.hardening is not None and not hasattr(arm.hardening, "prepare"):
            _require_splits(arm.hardening.recipe(rows, job.hardening(seed)))
        for stage in arm.stress.stages(rows, job.tuning(seed)(len(rows.user))):
            own = dataclasses.replace(rows, user=stage.rows)
            if arm.tuning is None:
                sft_recipe(own, stage.train)
            elif hasattr(arm.tuning, "prepare"):
                for role in arm.tuning.roles:
                    own.require(role, who=f"The defence '{arm.name}'")
            else:
                _require_splits(arm.tuning.recipe(own, stage.train))


def _require_effect(arm: Arm) -> None:
    if hasattr(arm.stress, "applied") and arm.tuning is not None:
        raise ConfigError(
            f"'{arm.stress_name}' edits weights and tunes nothing, so '{arm.name}' has nothing to act in.",
            expected="a defence of the alignment stage",
            found=f"{arm.name}, of the tuning stage",
            fix="leave the defence out, or choose another stress",
        )


def _require_splits(recipe: Recipe) -> None:
    """Raise `ConfigError` where a feed's batch cannot be split into the micro-batches that were asked for."""
    for name, feed in recipe.feeds.items():
        size = feed.batch_size or recipe.config.batch_size
        if size < recipe.config.accumulate:
            raise ConfigError(
                f"The batch of '{name}' rows is too small to be split.",
                expected=f"at least {recipe.config.accumulate} rows per step, one per micro-batch",
                found=f"{size} with '{recipe.settings.get('method', '')}'",
                fix="lower --accumulate, or raise the method's own batch with --set",
            )
