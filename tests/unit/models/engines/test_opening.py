# SPDX-License-Identifier: Apache-2.0
"""Every engine is opened in one way."""

from __future__ import annotations

import subprocess
import sys

import pytest

import keelwright.models.engines
from keelwright.core.decoding import DecodingConfig
from keelwright.core.errors import ConfigError, MissingError, OfflineError
from keelwright.core.records import Item
from keelwright.models.engines import LocalEngine, OpenAIConfig, OpenAIEngine, VllmConfig, open_engine


def test_a_folder_is_answered_in_this_process(make_folder):
    engine = open_engine(str(make_folder()), offline=True)
    assert isinstance(engine, LocalEngine)
    assert engine.network is None
    items = [Item("a", "s", "benign", "x", "cat")]
    assert len(engine.answer(items, DecodingConfig(max_new_tokens=2))) == 1


def test_an_address_stands_above_the_one_in_the_settings():
    settings = OpenAIConfig(base_url="https://elsewhere.example/v1", concurrency=3, api_key_env="")
    engine = open_engine("m", kind="openai", base_url="http://localhost:9", settings=settings, offline=True)
    assert isinstance(engine, OpenAIEngine)
    assert engine.config == OpenAIConfig(base_url="http://localhost:9", concurrency=3, api_key_env="")


def test_offline_holds_for_servers():
    with pytest.raises(OfflineError):
        open_engine("m", kind="openai", offline=True)


def test_vllm_is_said_to_be_missing_where_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingError, match="vLLM is not installed"):
        open_engine("m", kind="vllm")


def test_an_unknown_kind_gets_the_nearest_one():
    with pytest.raises(ConfigError) as caught:
        open_engine("m", kind="openia")
    assert caught.value.fix == "did you mean 'openai'?"


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "hf", "settings": OpenAIConfig()},
        {"kind": "hf", "base_url": "http://localhost:9"},
        {"kind": "openai", "settings": VllmConfig()},
        {"kind": "vllm", "settings": OpenAIConfig()},
    ],
)
def test_settings_of_another_engine_are_refused(wrong):
    with pytest.raises(ConfigError):
        open_engine("m", **wrong)


def test_public_names_resolve_and_load_no_torch():
    for name in keelwright.models.engines.__all__:
        assert getattr(keelwright.models.engines, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'OpenEngine'"):
        keelwright.models.engines.OpenEngine  # noqa: B018
    code = (
        "import sys\nfrom keelwright.models.engines import OpenAIEngine, open_engine\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
