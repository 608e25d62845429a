# SPDX-License-Identifier: Apache-2.0
"""Remedies at the prompt, found by name: the same items, asked in another way."""

from __future__ import annotations

import importlib
from typing import Final

from keelwright.core.config import require_choice
from keelwright.measure.part import Mitigation

_PATHS: Final = {
    "cot": "keelwright.measure.mitigations.chain_of_thought:ChainOfThought",
    "task-guard": "keelwright.measure.mitigations.task_guard:TaskGuard",
    "restated-task": "keelwright.measure.mitigations.restated_task:RestatedTask",
}

MITIGATION_NAMES: Final = tuple(_PATHS)


def find_mitigation(name: str) -> Mitigation:
    """Return a remedy by name.

    Raises:
        ConfigError: There is no such remedy.
    """
    require_choice("mitigation", name, MITIGATION_NAMES)
    module, _, attribute = _PATHS[name].partition(":")
    mitigation: Mitigation = getattr(importlib.import_module(module), attribute)()
    return mitigation
