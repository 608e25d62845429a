# SPDX-License-Identifier: Apache-2.0
"""Engines: models that answer, in this process or behind a server. Names resolve on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keelwright.models.engines.local import LocalEngine
    from keelwright.models.engines.openai import OpenAIConfig, OpenAIEngine
    from keelwright.models.engines.opening import open_engine
    from keelwright.models.engines.vllm import VllmConfig, VllmEngine

_PUBLIC = {
    "LocalEngine": "local",
    "OpenAIConfig": "openai",
    "OpenAIEngine": "openai",
    "VllmConfig": "vllm",
    "VllmEngine": "vllm",
    "open_engine": "opening",
}

__all__ = ["LocalEngine", "OpenAIConfig", "OpenAIEngine", "VllmConfig", "VllmEngine", "open_engine"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
