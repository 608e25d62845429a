# SPDX-License-Identifier: Apache-2.0
"""A model behind a server on this machine answers as in this process; a run against it can be cut at any time."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from keelwright.core.decoding import DecodingConfig
from keelwright.core.records import Item
from keelwright.models.engines import LocalEngine, OpenAIConfig, OpenAIEngine
from keelwright.models.loading import load
from keelwright.worlds.workshop.suite import WorkshopSuite

RUN = """
import json, sys
from pathlib import Path
from keelwright.core.decoding import DecodingConfig
from keelwright.core.records import Item
from keelwright.models.engines import OpenAIConfig, OpenAIEngine

url, kept = sys.argv[1], Path(sys.argv[2])
lines = kept.read_text().split("\\n")[:-1] if kept.exists() else []
have = {(one["item"], 0) for one in map(json.loads, lines)}
items = [Item(f"i{n}", "s", "benign", "x", f"question {n}") for n in range(60)]

with kept.open("a") as stream:
    def keep(generations):
        for one in generations:
            stream.write(json.dumps({"item": one.item_id, "output": one.output}) + "\\n")
        stream.flush()

    engine = OpenAIEngine("tiny", OpenAIConfig(base_url=url, concurrency=4, api_key_env=""))
    engine.answer(items, DecodingConfig(max_new_tokens=5), have=have, on_batch=keep)
"""


@pytest.fixture(scope="module")
def servers():
    path = Path(__file__).parents[1] / "servers" / "openai_server.py"
    spec = importlib.util.spec_from_file_location("openai_server", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["openai_server"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def aligned():
    return LocalEngine(load("lab:workshop/aligned", offline=True))


@pytest.fixture(scope="module")
def behind_a_server(servers, aligned):
    """Serve the shipped organism: chats through its template, completions as they are."""
    one_at_a_time = threading.Lock()

    def respond(body):
        as_is = "prompt" in body
        said = {} if as_is else {message["role"]: message["content"] for message in body["messages"]}
        item = Item("only", "s", "benign", "x", body["prompt"] if as_is else said["user"], said.get("system"))
        with one_at_a_time:
            (made,) = aligned.answer([item], DecodingConfig(max_new_tokens=body["max_tokens"], as_is=as_is))
        return {
            "text": made.output,
            "finish_reason": {"eos": "stop", "length": "length"}[made.finish],
            "usage": {"prompt_tokens": made.n_prompt_tokens, "completion_tokens": made.n_tokens},
        }

    with servers.FakeServer(respond, models=["workshop"]).running() as server:
        yield server


@pytest.mark.parametrize(("as_is", "limit"), [(False, 48), (False, 4), (True, 8)])
def test_a_model_behind_a_server_answers_as_in_this_process(aligned, behind_a_server, as_is, limit):
    items = list(WorkshopSuite().items())[::20]
    decoding = DecodingConfig(max_new_tokens=limit, as_is=as_is)
    engine = OpenAIEngine("workshop", OpenAIConfig(base_url=behind_a_server.url, api_key_env=""), offline=True)
    assert len(items) >= 15
    assert engine.answer(items, decoding) == aligned.answer(items, decoding)


@pytest.fixture
def slow_server(servers):
    def respond(body):
        return {"text": body["messages"][-1]["content"].upper()}

    with servers.FakeServer(respond, delay_s=0.05).running() as server:
        yield server


def count(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def begin(server, kept):
    line = [sys.executable, "-c", RUN, server.url, str(kept)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})


def cut_after(server, kept, answers, with_signal):
    process = begin(server, kept)
    try:
        deadline = time.monotonic() + 60
        while count(kept) < answers:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "no answers came"
            time.sleep(0.005)
        process.send_signal(with_signal)
        sent = time.monotonic()
        _, said = process.communicate(timeout=30)
        return process.returncode, said, time.monotonic() - sent
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_cut_goes_on_and_asks_nothing_twice_that_it_kept(slow_server, tmp_path, with_signal):
    kept = tmp_path / "kept.jsonl"
    status, said, seconds = cut_after(slow_server, kept, 12, with_signal)
    assert status == -with_signal
    assert seconds < 5.0
    if with_signal == signal.SIGINT:
        assert said.rstrip().endswith("KeyboardInterrupt")
        assert "never retrieved" not in said
        assert "was destroyed" not in said
    before = {json.loads(line)["item"] for line in kept.read_text().splitlines()}
    assert 12 <= len(before) < 60
    asked = len(slow_server.asked)
    time.sleep(0.2)
    assert len(slow_server.asked) == asked
    process = begin(slow_server, kept)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert sorted(row["item"] for row in rows) == sorted(f"i{n}" for n in range(60))
    assert all(row["output"] == f"QUESTION {row['item'][1:]}" for row in rows)
    assert len(slow_server.asked) - asked == 60 - len(before)
