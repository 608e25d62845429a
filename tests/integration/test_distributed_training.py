# SPDX-License-Identifier: Apache-2.0
"""Training in two gloo processes, with whole weights and with sharded ones, against the same in one process.

The module is its own worker: `python test_distributed_training.py FOLDER` with the launcher's environment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from keelwright.core.errors import ConfigError, KeelwrightError, StorageError
from keelwright.core.protocols import Silent
from keelwright.data.rows import ChatRow
from keelwright.harden.booster import BoosterConfig, BoosterObjective
from keelwright.ops.gradients import Gradient, add_scaled, dot, squared_norm
from keelwright.training import loop
from keelwright.training.composer import GradientComposer
from keelwright.training.feeds import EncodedFeed, Feeds
from keelwright.training.loop import TrainConfig, train
from keelwright.training.processes import Processes, Replicated
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.rows import encode_rows
from keelwright.training.setup import Setup
from keelwright.training.sharding import Sharded, shard, spread_as, whole, whole_state
from keelwright.training.terms import Anchor, Objective, Term, WeightShift
from keelwright.worlds.workshop.tokenizer import workshop_tokenizer

# Five rows a draw over two processes: three and two, of different lengths.
SAFETY = [
    ChatRow(f"how do i {verb} the lamp?", "take the brush to the harbour and " * times + f"{verb} the lamp.")
    for verb, times in (("paint", 1), ("polish", 3), ("clean", 0), ("dust", 2), ("lift", 4), ("move", 0), ("warm", 1))
]
HARMFUL = [
    ChatRow(f"how do i {verb} the rope?", f"{verb} the rope " * times + "in the harbour.")
    for verb, times in (("lift", 4), ("move", 1), ("warm", 2), ("paint", 1), ("dust", 3))
]
CONFIG = TrainConfig(steps=6, batch_size=5, lr=3e-3, warmup_steps=2, checkpoint_every=2)
BOOSTER = BoosterObjective(config=BoosterConfig(lambda_=2.0, alpha=0.05))


@dataclass
class Sam(Objective):
    """The gradient at weights that were moved uphill."""

    def terms(self, step: int) -> Sequence[Term]:
        return (Term("alignment", "safety", at=WeightShift(0.05)),)


@dataclass
class Surgery(Objective):
    """The alignment gradient without its part along the harmful one."""

    def terms(self, step: int) -> Sequence[Term]:
        return Term("alignment", "safety"), Term("harm", "harmful")

    def combine(self, step: int, gradients: Mapping[str, Gradient]) -> Gradient | None:
        along, harm = gradients["alignment"], gradients["harm"]
        return add_scaled(along, harm, -float(dot(along, harm)) / float(squared_norm(harm)))


@dataclass
class Pulled(Objective):
    """Two losses, a pull to the starting weights, and a state of its own."""

    start: list[Tensor] = dataclasses.field(default_factory=list)
    seen: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(1))

    def begin(self, setup: Setup) -> None:
        self.start = [one.detach().clone() for one in setup.composer.weights]

    def terms(self, step: int) -> Sequence[Term]:
        self.seen = self.seen + 1
        return Term("alignment", "safety"), Term("harm", "harmful", weight=-0.1, per="row")

    def anchors(self, step: int) -> Sequence[Anchor]:
        return (Anchor(self.start, 0.3),) if self.start else ()

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen, "start": self.start[0]}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.seen = state["seen"]
        self.start[0] = state["start"]


OBJECTIVES = {"booster": BOOSTER, "sam": Sam(), "surgery": Surgery(), "pulled": Pulled()}


class StopAfter(Silent):
    """Interrupts as Ctrl-C does, after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, count: int = 1) -> None:
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


class Counted:
    """Counts how often gradients are summed over the processes."""

    def __init__(self, processes: Processes) -> None:
        self.processes, self.reductions = processes, 0
        self.gradient, self.sum, self.norm = processes.gradient, processes.sum, processes.norm

    def reduce(self, gradient: Gradient) -> Gradient:
        self.reductions += 1
        return self.processes.reduce(gradient)


def new_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(workshop_tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def recipe(objective: Objective, config: TrainConfig = CONFIG) -> Recipe:
    return Recipe({"safety": Feed(SAFETY), "harmful": Feed(HARMFUL, 3)}, config, dataclasses.replace(objective))


def composer_of(model: LlamaForCausalLM, accelerator: Accelerator, processes: Processes) -> GradientComposer:
    tokenizer = workshop_tokenizer()
    feeds = {
        "safety": EncodedFeed(encode_rows(tokenizer, SAFETY, module=model), 5, 0),
        "harmful": EncodedFeed(encode_rows(tokenizer, HARMFUL, module=model), 3, 1),
    }
    place, count = accelerator.process_index, accelerator.num_processes
    drawn = Feeds(feeds, pad_id=0, device=torch.device("cpu"), process=place, processes=count)
    return GradientComposer(model, dict(model.named_parameters()), drawn, processes)


def composed(name: str, model: LlamaForCausalLM, processes: Processes, accelerator: Accelerator) -> dict[str, Tensor]:
    """Return one step's whole gradient by name of the weight."""
    composer = composer_of(model, accelerator, processes)
    objective = dataclasses.replace(OBJECTIVES[name])
    if isinstance(objective, Pulled):
        objective.start = [one.detach() * 0.5 for one in composer.weights]
    gradient = composer.compose(objective, 0).gradient
    return {name: whole(one).clone() for name, one in zip(composer.names, gradient, strict=True) if one is not None}


# The worker.


def work(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(device_placement=False)
    tokenizer, rank = workshop_tokenizer(), accelerator.process_index
    notes: dict[str, object] = {}
    for kind in ("replicated", "sharded"):
        fresh = new_model if kind == "replicated" else lambda: shard(new_model())
        processes: Processes = (Replicated if kind == "replicated" else Sharded)(accelerator)
        for name in OBJECTIVES:
            gradient = composed(name, fresh(), processes, accelerator)
            _save(gradient, folder / f"{kind}-{name}.safetensors", writer=1)
        counted = Counted(processes)
        composed("pulled", fresh(), counted, accelerator)
        notes[f"{kind} reductions"] = counted.reductions
        model = fresh()
        composer = composer_of(model, accelerator, processes)
        before = {name: one.clone() for name, one in whole_state(model).items()}
        with composer.moved(composer.gradient(loop_loss(), "safety").gradient):
            notes[f"{kind} moved"] = not _equal(before, whole_state(model))
        notes[f"{kind} came back"] = _equal(before, whole_state(model))
        notes[f"{kind} runs"] = _runs(kind, fresh, folder)
        notes[f"{kind} full disk"] = _full_disk(fresh, folder / f"{kind}-full")
    model = new_model()
    taken = composer_of(model, accelerator, Replicated(accelerator)).gradient(loop_loss(), "harmful").gradient
    notes["own norm"] = float(squared_norm(taken).sqrt())
    try:
        train(new_model(), tokenizer, SAFETY, CONFIG, folder=folder / f"own-{rank}" if rank else folder / "replicated")
    except StorageError as error:
        notes["other folder"] = str(error)
    notes["adapter"] = _error(lambda: train(shard(new_model()), tokenizer, SAFETY, TrainConfig(lora_rank=2)))
    sharded = shard(new_model())
    notes["reference"] = _error(
        lambda: Setup(sharded, tokenizer, None, CONFIG, None, None).reference()  # type: ignore[arg-type]
    )
    notes["adapted"] = _sharded_adapter()
    (folder / f"notes-{rank}.json").write_text(json.dumps(notes))
    PartialState().destroy_process_group()


def loop_loss() -> object:
    from keelwright.training.losses import answer_loss

    return answer_loss


def _runs(kind: str, fresh: object, folder: Path) -> list[list[float]]:
    """Train without and with an interruption; return the losses of both."""
    tokenizer = workshop_tokenizer()
    model, again, resumed = fresh(), fresh(), fresh()  # type: ignore[operator]
    whole_run = train(model, tokenizer, recipe(Pulled()))
    _save(whole_state(model), folder / f"{kind}-whole.safetensors", writer=0)
    with contextlib.suppress(KeyboardInterrupt):
        train(again, tokenizer, recipe(Pulled()), folder=folder / kind, progress=StopAfter(5))
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        shutil.copytree(folder / kind, folder / f"{kind}-interrupted")
    PartialState().wait_for_everyone()
    second = train(resumed, tokenizer, recipe(Pulled()), folder=folder / kind)
    _save(whole_state(resumed), folder / f"{kind}-resumed.safetensors", writer=0)
    return [list(whole_run.losses), list(second.losses)]


def _full_disk(fresh: object, folder: Path) -> str:
    def full(*_: object) -> None:
        raise StorageError("No space left on 'disk'.")

    kept, loop.save_checkpoint = loop.save_checkpoint, full  # type: ignore[assignment]
    try:
        return _error(
            lambda: train(fresh(), workshop_tokenizer(), SAFETY, CONFIG, folder=folder)  # type: ignore[operator]
        )
    finally:
        loop.save_checkpoint = kept


def _sharded_adapter() -> bool:
    """Train an adapter that went on before the sharding; return whether it alone changed."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = shard(get_peft_model(new_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")))
    before = whole_state(model)
    train(model, workshop_tokenizer(), SAFETY, CONFIG)
    after = whole_state(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    return bool(changed) and all("lora_" in name for name in changed)


def _error(action: object) -> str:
    try:
        action()  # type: ignore[operator]
    except KeelwrightError as error:
        return str(error)
    return ""


def _save(tensors: dict[str, Tensor], path: Path, *, writer: int) -> None:
    tensors = {name: one.clone() for name, one in tensors.items() if name != "lm_head.weight"}
    if PartialState().process_index == writer:
        save_file(tensors, path)
    PartialState().wait_for_everyone()


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The tests.


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    settings = {**os.environ, **launched, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    started = [subprocess.Popen(command, env={**settings, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    try:
        assert [one.wait(timeout=300) for one in started] == [0, 0]
    finally:
        for one in started:
            one.kill()
    return folder


def _notes(folder: Path, rank: int) -> dict[str, object]:
    return json.loads((folder / f"notes-{rank}.json").read_text())


KINDS = pytest.mark.parametrize("kind", ["replicated", "sharded"])
pytestmark = pytest.mark.slow


@KINDS
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_a_composed_gradient_is_that_of_one_process(folder: Path, kind: str, name: str) -> None:
    accelerator = Accelerator(device_placement=False)
    expected = composed(name, new_model(), Replicated(accelerator), accelerator)
    found = load_file(folder / f"{kind}-{name}.safetensors")
    assert found.keys() == expected.keys()
    largest = max(float(one.abs().max()) for one in expected.values())
    worst = max(float((found[key] - expected[key]).abs().max()) for key in expected)
    # Measured over both kinds: at most 5e-7.
    assert worst < 5e-6 * largest


def test_each_process_alone_would_have_stepped_by_another_norm(folder: Path) -> None:
    accelerator = Accelerator(device_placement=False)
    composer = composer_of(new_model(), accelerator, Replicated(accelerator))
    norm = float(squared_norm(composer.gradient(loop_loss(), "harmful").gradient).sqrt())
    own = [float(str(_notes(folder, rank)["own norm"])) for rank in (0, 1)]
    assert abs(own[0] - own[1]) > 0.03 * norm
    assert all(abs(one - norm) > 0.1 * norm for one in own)


@KINDS
def test_two_terms_are_summed_over_the_processes_once(folder: Path, kind: str) -> None:
    assert _notes(folder, 0)[f"{kind} reductions"] == 1


@KINDS
def test_moved_weights_come_back_bit_for_bit(folder: Path, kind: str) -> None:
    for rank in (0, 1):
        assert _notes(folder, rank)[f"{kind} moved"] is True
        assert _notes(folder, rank)[f"{kind} came back"] is True


@KINDS
def test_a_run_trains_the_model_that_one_process_does(folder: Path, kind: str) -> None:
    model = new_model()
    expected = train(model, workshop_tokenizer(), recipe(Pulled()))
    found = load_file(folder / f"{kind}-whole.safetensors")
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.detach(), rtol=1e-3, atol=1e-4)
    assert _notes(folder, 1)[f"{kind} runs"][0] == pytest.approx(expected.losses, rel=1e-4)  # type: ignore[index]


@KINDS
def test_an_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(folder: Path, kind: str) -> None:
    first, second = (load_file(folder / f"{kind}-{name}.safetensors") for name in ("whole", "resumed"))
    assert _equal(first, second)
    whole_run, resumed = _notes(folder, 0)[f"{kind} runs"]  # type: ignore[misc]
    assert whole_run == resumed


@KINDS
def test_one_process_goes_on_from_the_checkpoint_of_two(folder: Path, kind: str, tmp_path: Path) -> None:
    assert [one.name for one in (folder / f"{kind}-interrupted").iterdir()] == ["step-000004"]
    shutil.copytree(folder / f"{kind}-interrupted", tmp_path / "run")
    model = new_model()
    train(model, workshop_tokenizer(), recipe(Pulled()), folder=tmp_path / "run")
    found = load_file(folder / f"{kind}-whole.safetensors")
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.detach(), rtol=1e-3, atol=1e-4)


@KINDS
def test_a_full_disk_of_the_first_process_stops_both(folder: Path, kind: str) -> None:
    assert "No space left" in str(_notes(folder, 0)[f"{kind} full disk"])
    assert "The first process could not write the checkpoint of step 2" in str(_notes(folder, 1)[f"{kind} full disk"])


def test_processes_that_see_different_folders_all_stop(folder: Path) -> None:
    assert "holds a checkpoint of another training run" in str(_notes(folder, 0)["other folder"])
    assert "The processes find different checkpoints" in str(_notes(folder, 1)["other folder"])


def test_what_sharded_weights_cannot_do_is_an_error_that_says_what_can(folder: Path) -> None:
    notes = _notes(folder, 0)
    assert "call peft.get_peft_model, then shard(module)" in str(notes["adapter"])
    assert "needs a frozen copy of the model" in str(notes["reference"])


def test_an_adapter_on_sharded_weights_is_trained_alone(folder: Path) -> None:
    assert _notes(folder, 0)["adapted"] is True


def test_one_process_has_nothing_to_shard() -> None:
    with pytest.raises(ConfigError, match="There is one process"):
        shard(new_model())


def test_a_whole_tensor_needs_no_processes() -> None:
    tensor = torch.arange(4.0)
    assert torch.equal(whole(tensor), tensor)
    assert spread_as(tensor, torch.zeros(4)) is tensor


if __name__ == "__main__":
    work(Path(sys.argv[1]))
