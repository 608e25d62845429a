# SPDX-License-Identifier: Apache-2.0
"""The training loop: what it changes, what it leaves, and exact resume."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, NumericalError, StorageError
from keelwright.core.protocols import Silent
from keelwright.data.rows import ChatRow
from keelwright.training.loop import TrainConfig, train
from keelwright.training.rows import batch_of, encode_rows

Model = Callable[..., LlamaForCausalLM]
CONFIG = TrainConfig(steps=8, batch_size=3, lr=1e-2, warmup_steps=2, schedule="linear", checkpoint_every=3)


class StopAfter(Silent):
    """Interrupts as Ctrl-C does, after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, count: int = 1) -> None:
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


def _weights(module: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_training_lowers_the_loss(tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]) -> None:
    result = train(new_model(), tokenizer, rows, TrainConfig(steps=30, batch_size=7, lr=1e-2))
    assert len(result.losses) == result.steps == 30
    assert result.losses[-1] < 0.5 * result.losses[0]


def test_first_loss_is_the_mean_over_answer_tokens(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    model = new_model()
    batch = batch_of(encode_rows(tokenizer, rows, module=model), pad_id=0)
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    result = train(model, tokenizer, rows, TrainConfig(steps=1, batch_size=len(rows)))
    assert result.losses[0] == pytest.approx(float(expected), rel=1e-5)


def test_one_step_equals_plain_adamw(tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]) -> None:
    ours, plain = new_model(), new_model()
    config = TrainConfig(steps=1, batch_size=len(rows), lr=1e-3, weight_decay=0.1, clip=0.5)
    train(ours, tokenizer, rows, config)
    batch = batch_of(encode_rows(tokenizer, rows, module=plain), pad_id=0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    optimizer.step()
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), weight, rtol=0, atol=2e-5)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    ends = []
    for seed in (1, 1, 2):
        model = new_model(attention_dropout=0.2)
        train(model, tokenizer, rows, TrainConfig(steps=4, batch_size=3, lr=1e-2, seed=seed))
        ends.append(_weights(model))
        torch.rand(5)
    assert _equal(ends[0], ends[1])
    assert not _equal(ends[0], ends[2])


def test_global_random_state_mode_and_flags_are_left_as_they_were(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    model = new_model()
    model.model.norm.weight.requires_grad_(False)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    train(model, tokenizer, rows, CONFIG)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    assert not any(child.training for child in model.modules())
    assert [name for name, one in model.named_parameters() if not one.requires_grad] == ["model.norm.weight"]
    assert all(one.grad is None for one in model.parameters())


@pytest.mark.parametrize("stopped_after", [1, 3, 4, 7])
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path, stopped_after: int
) -> None:
    whole = new_model(attention_dropout=0.1)
    expected = train(whole, tokenizer, rows, CONFIG)
    with pytest.raises(KeyboardInterrupt):
        train(
            new_model(attention_dropout=0.1),
            tokenizer,
            rows,
            CONFIG,
            folder=tmp_path,
            progress=StopAfter(stopped_after),
        )
    resumed = new_model(attention_dropout=0.1)
    result = train(resumed, tokenizer, rows, CONFIG, folder=tmp_path)
    assert _equal(_weights(whole), _weights(resumed))
    assert result.losses == expected.losses


def test_a_finished_run_is_not_trained_again(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    first, second = new_model(), new_model()
    train(first, tokenizer, rows, CONFIG, folder=tmp_path)
    train(second, tokenizer, rows, CONFIG, folder=tmp_path, progress=StopAfter(CONFIG.steps + 1))
    assert _equal(_weights(first), _weights(second))


_KILLED = """
import os, pickle, signal, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from keelwright.core.protocols import Silent
from keelwright.data.rows import read_chat_rows
from keelwright.training.loop import TrainConfig, train
class Die(Silent):
    done = 0
    def advance(self, count=1):
        self.done += count
        if self.done == 7:
            os.kill(os.getpid(), signal.SIGKILL)
model, rows, folder = sys.argv[1:]
config = TrainConfig(steps=8, batch_size=3, lr=1e-2, warmup_steps=2, schedule="linear", checkpoint_every=3)
module = AutoModelForCausalLM.from_pretrained(model)
train(module, AutoTokenizer.from_pretrained(model), read_chat_rows(rows), config, folder=Path(folder), progress=Die())
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_a_run_killed_without_warning_resumes_to_the_same_bits(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    new_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = "".join(f'{{"prompt": "{row.prompt}", "answer": "{row.answer}"}}\n' for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    folders = [str(tmp_path / name) for name in ("model", "rows.jsonl", "training")]
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, *folders], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert [one.name for one in (tmp_path / "training").iterdir()] == ["step-000006"]
    whole, resumed = new_model(), new_model()
    train(whole, tokenizer, rows, CONFIG)
    train(resumed, tokenizer, rows, CONFIG, folder=tmp_path / "training")
    assert _equal(_weights(whole), _weights(resumed))


_SHARED = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from accelerate import PartialState
from safetensors.torch import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from keelwright.data.rows import read_chat_rows
from keelwright.training.loop import TrainConfig, train
model, rows, folder = sys.argv[1:]
config = TrainConfig(steps=8, batch_size=3, lr=1e-2, warmup_steps=2, schedule="linear", checkpoint_every=3)
module = AutoModelForCausalLM.from_pretrained(model)
train(module, AutoTokenizer.from_pretrained(model), read_chat_rows(rows), config, folder=Path(folder) / "training")
if PartialState().process_index == 1:
    save_model(module, str(Path(folder) / "trained.safetensors"))
PartialState().destroy_process_group()
"""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
def test_two_processes_train_the_model_that_one_does(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    new_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = "".join(f'{{"prompt": "{row.prompt}", "answer": "{row.answer}"}}\n' for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    settings = {**os.environ, **shared, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _SHARED, *(str(tmp_path / name) for name in ("model", "rows.jsonl", ""))]
    started = [subprocess.Popen(command, env={**settings, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    assert [one.wait(timeout=180) for one in started] == [0, 0]
    whole = new_model()
    expected = train(whole, tokenizer, rows, CONFIG)
    trained = new_model(seed=1)
    load_model(trained, tmp_path / "trained.safetensors")
    for name, weight in whole.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), weight, rtol=1e-3, atol=1e-4)
    notes = json.loads((tmp_path / "training" / "step-000008" / "training.json").read_text())
    assert notes["losses"] == pytest.approx(expected.losses, rel=1e-4)


def test_a_folder_of_another_run_is_refused(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    train(new_model(), tokenizer, rows, CONFIG, folder=tmp_path)
    with pytest.raises(StorageError, match="checkpoint of another training run"):
        train(new_model(seed=1), tokenizer, rows, CONFIG, folder=tmp_path)
    with pytest.raises(StorageError, match="checkpoint of another training run"):
        train(new_model(), tokenizer, rows[1:], CONFIG, folder=tmp_path)


def test_frozen_parameters_keep_their_bits(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    model = new_model()
    before = _weights(model)
    train(model, tokenizer, rows, CONFIG, frozen=("model.embed_tokens.weight",))
    assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert not torch.equal(model.model.norm.weight, before["model.norm.weight"])


def test_an_unknown_frozen_name_and_an_all_frozen_model_are_refused(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    model = new_model()
    with pytest.raises(ConfigError, match=r"no parameter 'model\.none' to freeze"):
        train(model, tokenizer, rows, CONFIG, frozen=("model.none",))
    with pytest.raises(ConfigError, match="Nothing is left to train"):
        train(model, tokenizer, rows, CONFIG, frozen=[name for name, _ in model.named_parameters()])
    assert all(one.requires_grad for one in model.parameters())


def test_a_loss_that_is_not_finite_stops_the_run(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]
) -> None:
    model = new_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(NumericalError, match="not finite at step 1"):
        train(model, tokenizer, rows, CONFIG)


def test_progress_is_told_of_every_step_and_of_resumed_ones(
    tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow], tmp_path: Path
) -> None:
    class Count(Silent):
        done, total = 0, 0

        def stage(self, title: str, total: int | None = None, unit: str = "") -> None:
            self.total = total or 0

        def advance(self, count: int = 1) -> None:
            self.done += count

    with pytest.raises(KeyboardInterrupt):
        train(new_model(), tokenizer, rows, CONFIG, folder=tmp_path, progress=StopAfter(4))
    told = Count()
    train(new_model(), tokenizer, rows, CONFIG, folder=tmp_path, progress=told)
    assert told.done == told.total == CONFIG.steps
