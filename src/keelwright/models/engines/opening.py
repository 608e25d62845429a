# SPDX-License-Identifier: Apache-2.0
"""One way to open every engine."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from keelwright.core.config import require_choice
from keelwright.core.errors import ConfigError
from keelwright.core.protocols import Engine

if TYPE_CHECKING:
    from keelwright.models.engines.openai import OpenAIConfig
    from keelwright.models.engines.vllm import VllmConfig

S = TypeVar("S")

EngineKind = Literal["hf", "vllm", "openai"]
"""hf: transformers in this process; vllm: vLLM in this process; openai: a server that speaks the OpenAI API."""


def open_engine(
    spec: str,
    *,
    kind: str = "hf",
    base_url: str | None = None,
    device: str = "cpu",
    offline: bool = False,
    settings: OpenAIConfig | VllmConfig | None = None,
) -> Engine:
    """Return an engine that is ready to answer.

    Args:
        spec: The model: a hub id, a folder, `lab:world/name`; for `openai` what the server calls it.
        kind: `hf`, `vllm` or `openai`.
        base_url: The server's address, for `openai`; stands above the one in `settings`.
        device: auto, cpu, cuda or cuda:N, for `hf`.
        offline: Never use the network; for `openai` only a server on this machine is asked.
        settings: Further settings of a `vllm` or `openai` engine.

    Raises:
        ConfigError: The kind is not known, or a setting belongs to another kind.
        KeelwrightError: What the engine itself raises: no such model, no such server, a package that is not installed.
    """
    require_choice("engine", kind, get_args(EngineKind))
    if base_url is not None and kind != "openai":
        raise ConfigError(
            f"The engine '{kind}' has no server.",
            expected="an address only with the engine 'openai'",
            found=base_url,
            fix="choose the engine 'openai', or leave the address out",
        )
    if kind == "openai":
        from keelwright.models.engines.openai import OpenAIConfig, OpenAIEngine

        config = _of_kind(settings, OpenAIConfig, kind) or OpenAIConfig()
        return OpenAIEngine(
            spec, config if base_url is None else dataclasses.replace(config, base_url=base_url), offline=offline
        )
    if kind == "vllm":
        from keelwright.models.engines.vllm import VllmConfig, VllmEngine

        return VllmEngine(spec, _of_kind(settings, VllmConfig, kind), offline=offline)
    from keelwright.models.engines.local import LocalEngine
    from keelwright.models.loading import load

    _of_kind(settings, type(None), kind)
    return LocalEngine(load(spec, device=device, offline=offline))


def _of_kind(settings: object, kind: type[S], engine: str) -> S | None:
    if settings is None or isinstance(settings, kind):
        return settings
    raise ConfigError(
        f"These settings are not those of the engine '{engine}'.",
        expected="no settings" if kind is type(None) else kind.__name__,
        found=type(settings).__name__,
        fix="give the settings of the engine that is chosen",
    )
