# SPDX-License-Identifier: Apache-2.0
"""The lab's guard as a screen."""

from __future__ import annotations

from keelwright.judges.screening.guard import GuardForm, GuardModel
from keelwright.worlds.workshop.guard import GUARD_TEXT, SAFE, UNSAFE, train_guard


def workshop_guard(seed: int) -> GuardModel:
    """Train the workshop's guard from a seed and return it; guards of two seeds share neither weights nor rows."""
    model = train_guard(seed)
    return GuardModel(model.module, model.tokenizer, GuardForm(*GUARD_TEXT, SAFE, UNSAFE), name=model.name)
