# SPDX-License-Identifier: Apache-2.0
"""What training says of bad rows, bad models and failing machines, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftConfig, VeraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from keelwright.core.errors import ConfigError, DataError, NumericalError, StorageError
from keelwright.core.protocols import Silent
from keelwright.data.rows import ChatRow, read_chat_rows
from keelwright.harden.booster import BoosterConfig, BoosterObjective
from keelwright.training import checkpoints
from keelwright.training.loop import TrainConfig, train
from keelwright.training.losses import Forward, answer_loss
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.rows import Batch
from keelwright.training.terms import Objective, Term
from keelwright.worlds.workshop.tokenizer import workshop_tokenizer

ROWS = [
    ChatRow(f"how do i {verb} the lamp?", f"take the brush and {verb} the lamp.")
    for verb in ("paint", "polish", "clean", "dust", "lift", "move", "warm")
]
CONFIG = TrainConfig(steps=6, batch_size=3, lr=1e-2, checkpoint_every=2)


def new_model(**settings: object) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tied = {"vocab_size": len(workshop_tokenizer()), "max_position_embeddings": 64, "tie_word_embeddings": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **tied, **settings})).eval()


def booster(config: TrainConfig = CONFIG) -> Recipe:
    objective = BoosterObjective(config=BoosterConfig(lambda_=2.0, alpha=0.05))
    return Recipe({"safety": Feed(ROWS), "harmful": Feed(ROWS[3:], 2)}, config, objective)


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: one.clone() for name, one in model.state_dict().items()}


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Rows.


def test_a_file_without_answers_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "how do i paint it?", "output": "so."}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"line 1 has no text in 'answer'(.|\n)*keys prompt, output"):
        read_chat_rows(path)


def test_rows_without_any_answer_are_refused() -> None:
    with pytest.raises(DataError, match=r"None of the 'user' rows has an answer(.|\n)*2 rows with an empty answer"):
        train(new_model(), workshop_tokenizer(), [ChatRow("a", ""), ChatRow("b", " ")], CONFIG)


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError, match="There are no 'user' rows to train on"):
        train(new_model(), workshop_tokenizer(), [], CONFIG)


def test_rows_that_were_rendered_already_are_refused() -> None:
    rows = [ChatRow(f"<|im_start|>user\n{row.prompt}<|im_end|>", row.answer) for row in ROWS]
    with pytest.raises(DataError, match=r"look rendered already(.|\n)*'<\|im_start\|>' in 7 of 7 rows"):
        train(new_model(), workshop_tokenizer(), rows, CONFIG)


def test_a_tokenizer_without_chat_template_trains_on_plain_text_with_an_end() -> None:
    tokenizer = workshop_tokenizer()
    tokenizer.chat_template = None
    result = train(new_model(), tokenizer, ROWS, dataclasses.replace(CONFIG, steps=30))
    assert result.losses[-1] < result.losses[0]


def test_rows_beyond_the_context_are_an_error_or_counted() -> None:
    long = ChatRow("how do i paint it?", "take the brush and paint it. " * 20)
    with pytest.raises(DataError, match=r"Row 2 is too long(.|\n)*at most 64 tokens(.|\n)*1 of 2 'user' rows"):
        train(new_model(), workshop_tokenizer(), [ROWS[0], long], dataclasses.replace(CONFIG, batch_size=1))
    config = dataclasses.replace(CONFIG, steps=1, batch_size=1)
    left = train(new_model(), workshop_tokenizer(), [ROWS[0], long], dataclasses.replace(config, too_long="leave out"))
    assert (left.fitted["user"].left_out, len(left.fitted["user"].rows)) == (1, 1)
    cut = train(new_model(), workshop_tokenizer(), [ROWS[0], long], dataclasses.replace(config, too_long="cut"))
    assert (cut.fitted["user"].cut, len(cut.fitted["user"].rows[1].ids)) == (1, 64)
    assert cut.fitted["user"].tokens_cut > 0


def test_prompts_that_leave_no_token_for_an_answer_are_refused() -> None:
    rows = [ChatRow("how do i paint the lamp in the harbour? " * 20, "so.")]
    with pytest.raises(DataError, match="None of the 'user' rows has an answer token"):
        train(new_model(), workshop_tokenizer(), rows, dataclasses.replace(CONFIG, batch_size=1, too_long="cut"))


# Numbers that are none.


@dataclass
class Spoilt(Objective):
    """A loss that is spoilt at one step."""

    value: bool = True
    """Whether the loss itself is spoilt, or its gradient alone."""

    def terms(self, step: int) -> Sequence[Term]:
        def loss(model: Forward, batch: Batch) -> Tensor:
            found = answer_loss(model, batch)
            if step != 3:
                return found
            return found * math.nan if self.value else found + (found * 0.0).sqrt()

        return (Term("task", "user", loss=loss),)


@pytest.mark.parametrize(("value", "what"), [(True, "The loss 'task'"), (False, "The gradient's norm")])
def test_a_number_that_is_none_stops_with_the_last_good_weights_and_names_the_rows(
    tmp_path: Path, value: bool, what: str
) -> None:
    good, model = new_model(), new_model()
    train(good, workshop_tokenizer(), ROWS, dataclasses.replace(CONFIG, steps=3))
    recipe = Recipe({"user": Feed(ROWS)}, CONFIG, Spoilt(value=value))
    with pytest.raises(
        NumericalError, match=rf"{what} is not finite at step 4; the weights are those of step 3"
    ) as told:
        train(model, workshop_tokenizer(), recipe, folder=tmp_path)
    # Draw 3 of three rows each out of seven: rows 10 to 12, over the end of the first pass.
    assert "user rows" in str(told.value)
    assert _equal(_weights(model), _weights(good))
    assert [one.name for one in tmp_path.iterdir()] == ["step-000003"]
    assert all(one.grad is None for one in model.parameters())


def test_weights_that_are_not_finite_are_named_and_never_saved(tmp_path: Path) -> None:
    model = new_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    with pytest.raises(NumericalError, match=r"because the weight 'model\.norm\.weight' is not"):
        train(model, workshop_tokenizer(), ROWS, CONFIG, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_float16_weights_are_refused_and_an_adapter_beside_them_is_not() -> None:
    with pytest.raises(ConfigError, match=r"cannot be trained in float16(.|\n)*float32 or bfloat16, or train a LoRA"):
        train(new_model().half(), workshop_tokenizer(), ROWS, CONFIG)
    bfloat16 = new_model().to(torch.bfloat16)
    before = _weights(bfloat16)
    adapter = train(bfloat16, workshop_tokenizer(), ROWS, dataclasses.replace(CONFIG, lora_rank=2)).adapter
    assert adapter is not None
    assert _equal(_weights(adapter.detach()), before)


# Precision and checkpointing of activations.


def test_checkpointed_activations_give_the_same_composed_step() -> None:
    plain, saved = new_model(), new_model()
    train(plain, workshop_tokenizer(), booster())
    train(saved, workshop_tokenizer(), booster(dataclasses.replace(CONFIG, gradient_checkpointing=True)))
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(saved.get_parameter(name), weight, rtol=0, atol=1e-6)
    assert not saved.is_gradient_checkpointing


def test_bfloat16_passes_and_bfloat16_weights_train_near_float32() -> None:
    config = dataclasses.replace(CONFIG, steps=20)
    losses = [train(new_model(), workshop_tokenizer(), booster(config)).losses[-1]]
    losses.append(
        train(new_model(), workshop_tokenizer(), booster(dataclasses.replace(config, precision="bf16"))).losses[-1]
    )
    losses.append(train(new_model().to(torch.bfloat16), workshop_tokenizer(), booster(config)).losses[-1])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.05)


# Adapters.

ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=2, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "loha": LoHaConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "vera": VeraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_of_a_model_with_an_adapter_the_adapter_alone_is_trained(kind: str, tmp_path: Path) -> None:
    adapter: PeftConfig = ADAPTERS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(new_model(), adapter)
    able = {name for name, one in model.named_parameters() if one.requires_grad}
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    train(model, workshop_tokenizer(), booster(), folder=tmp_path)
    changed = {name for name, one in model.named_parameters() if not torch.equal(one, before[name])}
    assert changed
    assert changed <= able
    assert {name for name, one in model.named_parameters() if one.requires_grad} == able


def test_a_second_adapter_is_refused() -> None:
    model = get_peft_model(new_model(), dataclasses.replace(ADAPTERS["lora"]))
    with pytest.raises(ConfigError, match=r"carries an adapter already(.|\n)*set 'lora_rank' to 0"):
        train(model, workshop_tokenizer(), ROWS, dataclasses.replace(CONFIG, lora_rank=2))


def test_an_adapter_goes_on_the_named_layers_alone_and_unknown_names_are_refused() -> None:
    config = dataclasses.replace(CONFIG, lora_rank=2, lora_targets=("q_proj", "v_proj"))
    adapter = train(new_model(), workshop_tokenizer(), ROWS, config).adapter
    assert adapter is not None
    assert {name.split(".")[-2] for name in adapter.factors()} == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match=r"No linear layer of the model is called 'query'(.|\n)*q_proj"):
        train(new_model(), workshop_tokenizer(), ROWS, dataclasses.replace(config, lora_targets=("q_proj", "query")))


# Interruptions.

_KILLED = """
import os, signal, sys, torch
sys.path.insert(0, os.path.dirname(sys.argv[1]))
torch.set_num_threads(1)
from pathlib import Path
from keelwright.core.protocols import Silent
from keelwright.training.loop import train
from test_training_input import booster, new_model, workshop_tokenizer
class Die(Silent):
    done = 0
    def advance(self, count=1):
        self.done += count
        if self.done == 5:
            os.kill(os.getpid(), signal.SIGKILL)
train(new_model(), workshop_tokenizer(), booster(), folder=Path(sys.argv[2]), progress=Die())
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_a_composed_run_that_was_killed_resumes_to_the_same_bits(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLED, __file__, str(tmp_path / "run")]
    killed = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [one.name for one in (tmp_path / "run").iterdir()] == ["step-000004"]
    whole, resumed = new_model(), new_model()
    train(whole, workshop_tokenizer(), booster())
    train(resumed, workshop_tokenizer(), booster(), folder=tmp_path / "run")
    assert _equal(_weights(whole), _weights(resumed))


def test_ctrl_c_leaves_a_checkpoint_and_the_same_bits_after_resuming(tmp_path: Path) -> None:
    class Stop(Silent):
        left = 5

        def advance(self, count: int = 1) -> None:
            self.left -= count
            if not self.left:
                raise KeyboardInterrupt

    whole, model = new_model(), new_model()
    train(whole, workshop_tokenizer(), booster())
    with pytest.raises(KeyboardInterrupt):
        train(model, workshop_tokenizer(), booster(), folder=tmp_path, progress=Stop())
    assert not model.training
    resumed = new_model()
    train(resumed, workshop_tokenizer(), booster(), folder=tmp_path)
    assert _equal(_weights(whole), _weights(resumed))


def test_a_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, save = [], checkpoints.save_file

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        written.append(path)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(StorageError, match=r"(?i)space"):
        train(new_model(), workshop_tokenizer(), booster(), folder=tmp_path)
    assert "step-000002" in [one.name for one in tmp_path.iterdir()]
    assert len(json.loads((tmp_path / "step-000002" / "training.json").read_text())["losses"]) == 2
    monkeypatch.undo()
    whole, resumed = new_model(), new_model()
    train(whole, workshop_tokenizer(), booster())
    train(resumed, workshop_tokenizer(), booster(), folder=tmp_path)
    assert _equal(_weights(whole), _weights(resumed))
    assert [one.name for one in tmp_path.iterdir()] == ["step-000006"]
