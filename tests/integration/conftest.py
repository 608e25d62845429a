# SPDX-License-Identifier: Apache-2.0
"""What a user types, in a process of its own that cannot reach the network."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from keelwright.core.protocols import Silent

OFFLINE_DRIVER = """
import socket
def refuse(*_):
    raise RuntimeError("a test reached for the network")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from keelwright.cli.app import main
main()
"""


def command(*words):
    return [sys.executable, "-c", OFFLINE_DRIVER, *map(str, words)]


@pytest.fixture(scope="session")
def keelwright():
    """Run `keelwright WORDS`; return the finished process. `code` is the exit status expected."""

    def run(*words, cwd=None, code=0, env=None):
        done = subprocess.run(
            command(*words), cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def keelwright_json(keelwright):
    """Run `keelwright WORDS --json` and return the one document on stdout."""

    def run(*words, **options):
        return json.loads(keelwright(*words, "--json", **options).stdout)

    return run


@pytest.fixture(scope="session")
def interrupted():
    """Start `keelwright WORDS`, wait until `ready()` is true, send `with_signal`, and return the exit status."""

    def run(*words, ready, with_signal=signal.SIGKILL, cwd=None):
        process = subprocess.Popen(command(*words), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + 120
            while not ready():
                assert process.poll() is None, "ended before it could be interrupted:\n" + process.stderr.read()
                assert time.monotonic() < deadline, "never became ready"
                time.sleep(0.005)
            process.send_signal(with_signal)
            return process.wait(timeout=60), process.stderr.read()
        finally:
            process.kill()
            process.wait()

    return run


@pytest.fixture(scope="session")
def killed_at():
    """Run `keelwright WORDS` in a process that sends itself kill -9 when it calls `place` (`package.module:name`)."""

    def run(*words, place, cwd):
        module, _, name = place.partition(":")
        trap = f"""
import importlib, os, signal
owner = importlib.import_module({module!r})
*path, last = {name!r}.split(".")
for part in path:
    owner = getattr(owner, part)
setattr(owner, last, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
"""
        line = [sys.executable, "-c", trap + OFFLINE_DRIVER, *map(str, words)]
        done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"

    return run


@pytest.fixture(scope="session")
def damage(tmp_path_factory):
    """The demo's inputs: `tuned/`, `mood.jsonl`, `forbidden.jsonl`, `tuning.jsonl`."""
    from keelwright.heal.demo import make_damage

    folder = tmp_path_factory.mktemp("damage")
    make_damage(folder, seed=0, device="cpu", progress=Silent())
    return folder


@pytest.fixture
def typed(tmp_path, monkeypatch):
    """Run `keelwright WORDS` in this process, in an empty folder, without the network; `code` is the status expected.

    Loading torch once for many lines; what a line leaves in the process is what tests of its own process are for.
    """
    import socket

    from typer.testing import CliRunner

    from keelwright.cli.app import app

    def refuse(*_, **__):
        raise RuntimeError("a test reached for the network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)

    def run(*words, code=0):
        done = CliRunner().invoke(app, [str(word) for word in words])
        crash = "" if done.exception is None else repr(done.exception)
        assert done.exit_code == code, f"exit {done.exit_code} {crash}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def typed_json(typed):
    """As `typed`, with `--json`; return the one document on stdout."""

    def run(*words, **options):
        return json.loads(typed(*words, "--json", **options).stdout)

    return run


@pytest.fixture(scope="session")
def byte_models(tmp_path_factory):
    """Two folders with tiny Llamas that read bytes and have 8,192 positions: any prompt fits, no answer makes sense."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {"<pad>": 0, "<end>": 1, **{letter: number for number, letter in enumerate(letters, 2)}}
    pieces = Tokenizer(models.BPE(vocab=ids, merges=[]))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    folder = tmp_path_factory.mktemp("bytes")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(ids), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=8192, initializer_range=0.4, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "one", folder / "two"
