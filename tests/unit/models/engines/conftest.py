# SPDX-License-Identifier: Apache-2.0
"""A real server on this machine, and engines that ask it."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from keelwright.core.protocols import Silent
from keelwright.core.records import Item
from keelwright.models.engines.openai import OpenAIConfig, OpenAIEngine


def load_server_module() -> ModuleType:
    path = Path(__file__).parents[3] / "servers" / "openai_server.py"
    spec = importlib.util.spec_from_file_location("openai_server", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["openai_server"] = module
    spec.loader.exec_module(module)
    return module


def echo(body: dict[str, Any]) -> dict[str, Any]:
    """Answer with a function of the prompt and the seed alone."""
    prompt = body.get("prompt") or " ".join(f"{one['role']}={one['content']}" for one in body["messages"])
    return {"text": f"{prompt}|{body.get('seed')}"}


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.advanced = 0

    def note(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, count: int = 1) -> None:
        self.advanced += count


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture(scope="session")
def servers() -> ModuleType:
    return load_server_module()


@pytest.fixture
def serve(servers: ModuleType) -> Iterator[Callable[..., Any]]:
    """Start a server; `respond` makes its answers."""
    with contextlib.ExitStack() as open_servers:
        yield lambda respond=echo, **settings: open_servers.enter_context(
            servers.FakeServer(respond, **settings).running()
        )


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., OpenAIEngine]:
    """Make an engine for a server, patient for a moment only."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def make(server: Any, model: str = "tiny", **settings: Any) -> OpenAIEngine:
        return OpenAIEngine(
            model, OpenAIConfig(base_url=server.url, **{"backoff_s": 0.01, "retries": 3, "timeout_s": 10.0, **settings})
        )

    return make


@pytest.fixture
def make_items() -> Callable[..., list[Item]]:
    def make(count: int = 12, system: str | None = None) -> list[Item]:
        return [
            Item(f"item/{index}", "s", "benign", "x", f"a question of its own, {index}", system)
            for index in range(count)
        ]

    return make
